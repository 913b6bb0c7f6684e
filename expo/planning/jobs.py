"""What becomes of one tensor: a copy of the donor's, or a blend of several models' tensors."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from expo.checkpoint.dtypes import ITEM_BYTES
from expo.checkpoint.weight import Weight
from expo.operators.methods import METHODS, Sparsifier
from expo.operators.rules import Keep
from expo.planning.rows import SharedRows
from expo.spec.request import MatrixEdit


@dataclass(frozen=True, slots=True)
class Copy:
    """The donor's tensor. `equal` are those that must hold the same: integers cannot be blended; `between`
    names the models that disagree where they do not."""

    equal: tuple[Weight, ...] = ()
    between: str = ""

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.equal


@dataclass(frozen=True, slots=True)
class Term:
    """One model's tensor in a blend, with its parameters (α or weight, density, …)."""

    weight: Weight
    parameters: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Blend:
    """A method over the tensors of several models.

    `base` is what deltas are counted from (None for means and arcs of whole models), `start` what the
    change is added to. `sparsifier` says how the elements of every Δ are chosen, `elects_sign` whether
    the models agree on signs (TIES).
    """

    method: str
    terms: tuple[Term, ...]
    base: Weight | None
    start: Weight
    shared: Mapping[str, float] = field(default_factory=dict)
    sparsifier: Sparsifier | None = None
    elects_sign: bool = False

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Every tensor that is read, each once."""
        named = (self.base, self.start, *(term.weight for term in self.terms))
        return tuple({id(weight): weight for weight in named if weight is not None}.values())

    @property
    def is_sparse(self) -> bool:
        """Whether elements of a Δ are left out, which ones being a matter of the whole tensor."""
        dense = all(term.parameters.get("density", 1.0) >= 1 for term in self.terms)
        return self.sparsifier is not None and not dense

    @property
    def needs_whole(self) -> bool:
        """Whether something about whole tensors has to be known before the first block."""
        return self.is_sparse or METHODS[self.method].prepare is not None

    @property
    def is_extrapolation(self) -> bool:
        """Whether it is the formula of a pair: θ_aligned + (α − 1)·Δ, with nothing done to Δ."""
        return (
            self.method == "expo"
            and len(self.terms) == 1
            and self.start is self.base
            and not self.is_sparse
        )

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(t.parameters["alpha"] for t in self.terms if "alpha" in t.parameters)

    def at(self, alpha: float) -> "Blend":
        """The same for another α of every model."""
        terms = (replace(t, parameters={**t.parameters, "alpha": alpha}) for t in self.terms)
        return replace(self, terms=tuple(terms))


Rule = Copy | Blend


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A matrix in a tensor, rows × columns elements from `begin`, of which only a part is kept.

    `delta` says how much of every Δ, `result` how much of what comes out, one after the other.
    """

    label: str
    begin: int
    shape: tuple[int, int]
    delta: MatrixEdit | None = None
    result: tuple[Keep, ...] = ()

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def working_bytes(self) -> int:
        """What one takes: five float32 copies, and three Gram matrices in float64."""
        return 4 * 5 * self.count + 8 * 3 * min(self.shape) ** 2


@dataclass(frozen=True, slots=True)
class Stretch:
    """`count` elements of the donor from `begin`, and where the tensors of the rule have theirs, in the
    order of `Rule.weights`; None: only the donor has them, they are copied."""

    begin: int
    starts: tuple[int, ...] | None
    count: int


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor of the output, in the shape of the donor's and in `dtype`.

    `rows` is empty where row i of every model is row i. `matrices`, in order, are those that are edited.
    """

    name: str
    dtype: str
    donor: Weight
    rule: Rule
    rows: tuple[SharedRows, ...] = ()
    matrices: tuple[MatrixJob, ...] = ()

    @property
    def inputs(self) -> tuple[Weight, ...]:
        """Every tensor that this one is made of."""
        weights = self.rule.weights
        only_donor = isinstance(self.rule, Copy) or any(row.others is None for row in self.rows)
        return (self.donor, *weights) if only_donor and self.donor not in weights else weights

    @property
    def is_coded(self) -> bool:
        """Whether it is blended from codes."""
        is_blend = isinstance(self.rule, Blend)
        return is_blend and any(weight.codes is not None for weight in self.rule.weights)

    @property
    def is_held_whole(self) -> bool:
        """Whether it is looked at whole before its first block, and then again block by block."""
        return bool(self.matrices) or (isinstance(self.rule, Blend) and self.rule.needs_whole)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.donor.shape

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]

    def stretches(self) -> Iterator[Stretch]:
        """The tensor from its first element to its last, in runs that are contiguous in every model."""
        if not self.rows:
            yield Stretch(0, (0,) * len(self.rule.weights), self.count)
            return
        width = math.prod(self.shape[1:])
        for row in self.rows:
            starts = None if row.others is None else tuple(first * width for first in row.others)
            yield Stretch(row.donor * width, starts, row.count * width)
