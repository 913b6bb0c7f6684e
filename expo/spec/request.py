"""The request: what a merge is asked to compute, from flags or from a spec, defaults filled in."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from expo.checkpoint.child import search
from expo.checkpoint.parsing import shown
from expo.checkpoint.reference import Reference, parse_reference
from expo.errors import SpecError
from expo.operators.rules import Keep, parse_keep
from expo.spec.settings import Settings

Rounding = Literal["nearest", "stochastic"]
StopAt = Literal["error", "warning"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
DTYPES = ("bfloat16", "float16", "float32", "float64")
MAX_SEED = 2**32 - 1  # what NumPy takes, and so do the libraries on it
ADAPTER_DTYPES = ("float32", "bfloat16", "float16")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def dtype_name(text: str) -> str:
    """The one name of a dtype that may be written `bf16` or `torch.bfloat16`; others as they are."""
    bare = text.removeprefix("torch.")
    return _SHORT.get(bare, bare)


def check_seed(seed: int) -> None:
    """Raises SpecError: it is no seed that every library takes."""
    if not 0 <= seed <= MAX_SEED:
        raise SpecError(f"seed is a whole number from 0 to {MAX_SEED}, not {shown(seed)}")


@dataclass(frozen=True)
class Operand:
    """A model of a merge, with the settings of its own entry in the spec."""

    reference: Reference
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Consecutive layers [first, after the last) of every model; `layers` is None for all."""

    operands: tuple[Operand, ...]
    settings: Settings = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Transform:
    """What is done to every Δ before it is scaled: `name` is one of `operators.methods.TRANSFORMS`."""

    name: str
    parameters: Mapping[str, bool | float]


@dataclass(frozen=True)
class MatrixEdit:
    """How much of matrices to keep: of every Δ (the transform `low_rank`), or of the result (`laser`).

    `target` is searched for in the labels of the matrices; without it, those of the layers are meant.
    `layers` are [first, after the last). `force` cuts a Δ even where what goes is not rounding noise.
    """

    keep: Keep
    target: str | None = None
    layers: tuple[int, int] | None = None
    force: bool = False


@dataclass(frozen=True)
class Foreign:
    """A spec that runs through the mergekit library, word for word, and why it has to.

    `models` are the references behind the texts by which the spec names its models.
    """

    spec: dict
    models: Mapping[str, Reference]
    reasons: tuple[str, ...]
    changes_tokenizer: bool


@dataclass(frozen=True)
class Request:
    """One merge.

    `settings` are the spec's own `parameters`, which a slice's and an operand's override. An ExPO
    request without α is only good for a plan or a diff. `excluded` kinds of tensors and the fixed
    layers stay as they are in the donor. `low_rank` is done to every Δ before it is scaled, `edits` to
    the result, one after the other. `fits_vocabulary` says that the other models' tokens are to be brought
    into the base's order. `force` goes on where a gate refuses: see `forced`. `vectors` and `stop_at` are for the verification; `stream_inputs` reads weights on
    the Hub by range, without a download, and changes no byte of the output.
    """

    slices: tuple[Slice, ...]
    method: str = "expo"
    base: Reference | None = None
    onto: Reference | None = None
    donor: Reference | None = None
    settings: Settings = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()
    low_rank: MatrixEdit | None = None
    edits: tuple[MatrixEdit, ...] = ()
    excluded: tuple[str, ...] = ()
    fixed_first_layers: int = 0
    fixed_last_layers: int = 0
    dtype: str | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    max_shard_bytes: int | None = None
    allow_missing: str | None = None
    compares: bool = False  # two models are looked at side by side: neither is SFT or aligned
    include: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    vectors: Path | None = None
    stop_at: StopAt = "error"
    fits_vocabulary: bool = False
    foreign: Foreign | None = None
    stream_inputs: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Those of the first slice: every slice has the same models."""
        return self.slices[0].operands

    @property
    def is_pair(self) -> bool:
        """ExPO of one aligned model, which has the fast and most exact path where nothing is edited."""
        one = len(self.slices) == 1 and len(self.operands) == 1
        plain = self.onto is None and not self.transforms and self.foreign is None
        return self.method == "expo" and one and plain

    @property
    def alpha(self) -> float | None:
        """The one α of the whole model, None where it differs between tensors or models."""
        if not self.is_pair or self.excluded or self.fixed_first_layers or self.fixed_last_layers:
            return None
        alpha = self.operands[0].settings.get("alpha", self.settings.get("alpha"))
        return float(alpha) if isinstance(alpha, int | float) else None

    @property
    def gives_alpha(self) -> bool:
        """Whether α is given at all: without it an ExPO plan can be looked at, not run."""
        given = {key for s in self.slices for operand in s.operands for key in operand.settings}
        given |= {key for slice_ in self.slices for key in slice_.settings}
        return self.method != "expo" or "alpha" in given | self.settings.keys()

    def at(self, alpha: float) -> "Request":
        """The same with this α for every model and tensor that is not left alone.

        Raises:
            SpecError: the method is not ExPO, or α is not finite.
        """
        if self.method != "expo":
            raise SpecError(f"{self.method} has no alpha: only expo has")
        value = resolve_alpha(alpha, None, interpolate=True)
        assert value is not None
        slices = tuple(
            replace(
                part,
                operands=tuple(
                    replace(o, settings={**o.settings, "alpha": value}) for o in part.operands
                ),
            )
            for part in self.slices
        )
        return replace(self, slices=slices)

    def forced(self) -> "Request":
        """The same, past the gates: noise of quantized inputs that outweighs the change, low-rank cuts of a Δ at a
        level that is not rounding noise."""
        cut = None if self.low_rank is None else replace(self.low_rank, force=True)
        return replace(self, low_rank=cut, force=True)

    def references(self) -> Iterator[Reference]:
        """Every model that is read, each once."""
        named = (
            self.base,
            *(operand.reference for operand in self.operands),
            self.onto,
            self.donor,
        )
        yield from dict.fromkeys(reference for reference in named if reference is not None)


def matrix_edit(
    keep: str, *, target: object = None, layers: object = None, force: object = None
) -> MatrixEdit:
    """An edit from what a spec or the flags say.

    Raises:
        SpecError: the rule is none, or something is not of its kind.
    """
    rule = parse_keep(keep)
    if target is not None:
        try:
            search([str(target)], [])
        except ValueError as error:
            raise SpecError(f"target: {error}") from None
    span = None
    if layers is not None:
        if not (
            isinstance(layers, list | tuple)
            and len(layers) == 2
            and all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
            and 0 <= layers[0] < layers[1]
        ):
            raise SpecError(f"layers: [first, after the last], not {shown(layers)}")
        span = (layers[0], layers[1])
    if force not in (None, True, False):
        raise SpecError(f"force: true or false, not {shown(force)}")
    return MatrixEdit(rule, None if target is None else str(target), span, bool(force))


def expo_request(base: Reference, aligned: Reference, alpha: float | None) -> Request:
    """Plain ExPO of a pair."""
    settings: Settings = {} if alpha is None else {"alpha": alpha}
    return Request((Slice((Operand(aligned, settings),)),), base=base)


def laser_request(model: str, edit: MatrixEdit) -> Request:
    """One model with an edit."""
    reference = parse_reference(model, role="MODEL")
    return Request((Slice((Operand(reference),)),), "passthrough", edits=(edit,))


def paper_alpha(alpha: float) -> float:
    """The paper's a = α − 1, without the binary dust of the subtraction."""
    return float(f"{alpha - 1.0:.12g}")


def both_conventions(alpha: float | None) -> str:
    if alpha is None:
        return "an alpha that depends on the tensor"
    return f"alpha {alpha:.12g} (paper alpha {paper_alpha(alpha):.12g})"


def resolve_alpha(
    alpha: float | None, paper: float | None, *, interpolate: bool = False
) -> float | None:
    """α by the formula θ_sft + α·Δ, from whichever of the two conventions was given.

    Raises:
        SpecError: both are given, one is not finite, or 0 < α < 1 without `interpolate`.
    """
    if alpha is not None and paper is not None:
        raise SpecError("give alpha or paper alpha, not both (alpha = paper alpha + 1)")
    if alpha is None and paper is None:
        return None
    value = float(f"{1.0 + paper:.15g}") if paper is not None else float(alpha or 0.0)
    if not math.isfinite(value):
        raise SpecError(f"alpha must be a finite number, not {value}")
    if 0.0 < value < 1.0 and not interpolate:
        given = value if alpha is not None else paper_alpha(value)
        raise SpecError(_two_readings(given, is_paper=alpha is None))
    return value


def resolve_alphas(values: Iterable[float], *, interpolate: bool = False) -> tuple[float, ...]:
    """Several α by the formula, as they were given. Raises as `resolve_alpha`."""
    found = (resolve_alpha(value, None, interpolate=interpolate) for value in values)
    return tuple(value for value in found if value is not None)


def _two_readings(given: float, *, is_paper: bool) -> str:
    meant = "--interpolate (interpolate: true in a spec, interpolate=True in Python)"
    if is_paper:
        return (
            f"paper alpha {given:.12g} is alpha {1.0 + given:.12g}: a point between SFT and aligned, "
            f"not beyond; add {meant} if you mean it"
        )
    return (
        f"alpha {given:.12g} lies between SFT and aligned; cards that say {given:.12g} mean "
        f"--paper-alpha {given:.12g} (= alpha {1.0 + given:.12g}; paper_alpha in a spec and in Python); "
        f"for the point between, add {meant}"
    )


def make_request(
    sft: str,
    aligned: str,
    *,
    alpha: float | None = None,
    paper_alpha: float | None = None,
    interpolate: bool = False,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    max_shard_bytes: int | None = None,
) -> Request:
    """A checked request for the pair.

    Raises:
        SpecError: an argument is invalid.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    if dtype is not None and dtype not in DTYPES:
        raise SpecError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if rounding not in ROUNDINGS:
        raise SpecError(f"rounding {rounding} is not one of {', '.join(ROUNDINGS)}")
    request = expo_request(
        parse_reference(sft, role="SFT"),
        parse_reference(aligned, role="ALIGNED"),
        resolve_alpha(alpha, paper_alpha, interpolate=interpolate),
    )
    chosen: Rounding = "stochastic" if rounding == "stochastic" else "nearest"
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise SpecError(f"max_shard_bytes is a number of bytes above 0, not {max_shard_bytes}")
    return replace(
        request, dtype=dtype, rounding=chosen, seed=seed, max_shard_bytes=max_shard_bytes
    )
