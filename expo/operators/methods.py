"""The merge methods that stream through expo's engine, one entry each: what it takes, and its formula.

Names, parameters, defaults and orders of summation are mergekit's (0.1.5), so that its published specs give
the same weights; `expo` and the transforms are ours. A formula takes one block of every tensor as flat arrays
in the working precision and gives the exact result, which is then rounded once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from expo.errors import SpecError

Array = NDArray[np.floating]

Default = float | bool | None
"""None: has to be given."""

Base = Literal["required", "optional", "operand"]
"""`operand`: the base is one of the models like any other."""

Sparsifier = Literal["magnitude", "outliers", "random", "ranked"]
"""How the elements of a Δ that stay are chosen (see `operators.sparsify`)."""


@dataclass(frozen=True)
class Arc:
    """What spherical interpolation multiplies a and b with: one number, or one a row or a column."""

    a: Array
    b: Array
    by_column: bool = False

    def of(self, block: "Block") -> tuple[Array, Array]:
        """The coefficients of a block's elements, or one that all share."""
        a, b = (values.astype(block.start.dtype) for values in (self.a, self.b))
        if a.size == 1:
            return a, b
        places = np.arange(block.begin, block.begin + block.start.size)
        chosen = places % a.size if self.by_column else places // block.width
        return a[chosen], b[chosen]


@dataclass(frozen=True)
class Track:
    """What every Δ of one run counts for in a tensor, where the run has come to another step."""

    weights: tuple[float, ...]


@dataclass(frozen=True)
class Block:
    """One block of the tensors of a blend, flat, and the numbers that go with them.

    `base` is None where `thetas` are whole models, or deltas already. `masks` say which elements of each
    Δ stay (None: all), `found` is what `prepare` made. It holds the donor's elements from `begin`, `width` in a
    row.
    """

    thetas: Sequence[Array]
    base: Array | None
    start: Array
    values: Sequence[Mapping[str, float]]
    shared: Mapping[str, float]
    elects_sign: bool = False
    masks: "Sequence[Mask | None]" = ()
    found: Arc | Track | None = None
    begin: int = 0
    width: int = 1


class Mask(Protocol):
    """Which elements of a Δ stay, and what they are multiplied by."""

    @property
    def ratio(self) -> float: ...


class Operations(Protocol):
    """What a formula may ask of the processor beyond NumPy's arithmetic."""

    def add_terms(self, block: Block, weights: Sequence[float]) -> Array:
        """start + λ·Σ wᵢ·maskᵢ(Δᵢ): see `operators.merging.add_task_vectors`."""
        ...

    def dots(self, a: Array, b: Array) -> tuple[float, float, float]:
        """⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩, the same on every processor."""
        ...


@dataclass(frozen=True)
class Whole:
    """Whole tensors of a blend, block by block: `blocks` yields (first element, thetas, base) in blocks of
    whole rows, `shape` is the tensor's."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[tuple[int, Sequence[Array], Array | None]]]


Formula = Callable[[Operations, Block], Array]
Prepare = Callable[
    [Operations, Whole, Sequence[Mapping[str, float]], Mapping[str, float]], Arc | Track
]


def task_vectors(ops: Operations, block: Block) -> Array:
    """start + λ·Σ wᵢΔᵢ, in the order of the models; signs elected and normalized where asked."""
    return ops.add_terms(block, [value["weight"] for value in block.values])


def extrapolation(ops: Operations, block: Block) -> Array:
    """start + Σ αᵢΔᵢ. (One Δ on its own base goes by θ_aligned + (α − 1)·Δ instead: see `extrapolate`.)"""
    return ops.add_terms(block, [value["alpha"] for value in block.values])


def along_track(ops: Operations, block: Block) -> Array:
    """start + Σ wᵢΔᵢ, the weights from `track_weights`."""
    assert isinstance(block.found, Track)
    return ops.add_terms(block, block.found.weights)


def mean(_: Operations, block: Block) -> Array:
    """Σ wᵢθᵢ, over Σ wᵢ if normalized."""
    weights = [value["weight"] for value in block.values]
    total = np.zeros_like(block.start)
    for theta, weight in zip(block.thetas, weights, strict=True):
        total += theta * weight
    return total / math.fsum(weights) if block.shared["normalize"] else total


def scaled(_: Operations, block: Block) -> Array:
    """The tensor times a number."""
    return block.thetas[0] * block.values[0]["scale"]


def slerp(_: Operations, block: Block) -> Array:
    """c_a·θ_base + c_b·θ."""
    assert block.base is not None
    return _arc(block, block.base, block.thetas[0])


def nuslerp(_: Operations, block: Block) -> Array:
    """c_a·a + c_b·b of two models, or of their task vectors, which are then added to the base."""
    if block.base is None:
        return _arc(block, *block.thetas)
    a, b = (theta - block.base for theta in block.thetas)
    return block.base + _arc(block, a, b)


def _arc(block: Block, a: Array, b: Array) -> Array:
    assert isinstance(block.found, Arc)
    one, two = block.found.of(block)
    return one * a + two * b


def slerp_arc(
    ops: Operations, whole: Whole, _: Sequence[Mapping[str, float]], shared: Mapping[str, float]
) -> Arc:
    """One angle between the flattened tensors."""
    sums = np.zeros(3)
    for _first, thetas, base in whole.blocks():
        assert base is not None
        sums += ops.dots(base, thetas[0])
    a, b = slerp_coefficients(math.sqrt(sums[0]), math.sqrt(sums[1]), sums[2], shared["t"])
    return Arc(np.array([a]), np.array([b]))


def nuslerp_arc(
    ops: Operations,
    whole: Whole,
    values: Sequence[Mapping[str, float]],
    shared: Mapping[str, float],
) -> Arc:
    """One angle for the tensor, or one for every row or column."""
    flat = bool(shared["nuslerp_flatten"]) or len(whole.shape) < 2
    by_column = bool(shared["nuslerp_row_wise"]) and not flat
    width = whole.shape[-1] if whole.shape else 1
    sums = np.zeros((3, 1 if flat else width if by_column else math.prod(whole.shape[:-1])))
    for first, thetas, base in whole.blocks():
        a, b = (theta if base is None else theta - base for theta in thetas)
        if flat:
            sums[:, 0] += ops.dots(a, b)
            continue
        rows = [x.reshape(-1, width).astype(np.float64) for x in (a, b)]
        products = [rows[0] * rows[0], rows[1] * rows[1], rows[0] * rows[1]]
        if by_column:
            sums += [product.sum(axis=0) for product in products]
        else:
            at = first // width
            sums[:, at : at + len(rows[0])] = [product.sum(axis=1) for product in products]
    weights = [value["weight"] for value in values]
    share = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    one, two = nuslerp_coefficients(sums[0], sums[1], sums[2], share)
    return Arc(one, two, by_column)


def slerp_coefficients(
    norm_a: float, norm_b: float, dot: float, t: float, *, threshold: float = 0.9995
) -> tuple[float, float]:
    """What spherical interpolation gives a and b, from their norms and ⟨a, b⟩ (Shoemake 1985).

    Linear where the two are nearly (anti)parallel. Zero vectors count as of norm 1.
    """
    lengths = [norm if norm > 1e-8 else 1.0 for norm in (norm_a, norm_b)]
    cosine = min(max(dot / (lengths[0] * lengths[1]), -1.0), 1.0)
    if abs(cosine) > threshold:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def nuslerp_coefficients(
    square_a: Array, square_b: Array, dot: Array, t: float
) -> tuple[Array, Array]:
    """The same for many vectors at once, as mergekit's NuSLERP has it.

    Args:
        square_a, square_b, dot: ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ of every pair, float64.
    """
    norm_a, norm_b = (np.maximum(np.sqrt(square), 1e-7) for square in (square_a, square_b))
    cosine = np.clip(dot / norm_a / norm_b, -1.0, 1.0)
    is_line = 1.0 - np.square(cosine) <= 1e-16
    angle = np.arccos(np.where(is_line, 0.0, cosine))
    sine = np.where(is_line, 1.0, np.sin(angle))
    arc_a, arc_b = np.sin((1.0 - t) * angle) / sine, np.sin(t * angle) / sine
    return np.where(is_line, 1.0 - t, arc_a), np.where(is_line, t, arc_b)


def relex_track(
    ops: Operations,
    whole: Whole,
    values: Sequence[Mapping[str, float]],
    shared: Mapping[str, float],
) -> Track:
    """The weights of every Δ, from all ⟨Δᵢ, Δⱼ⟩ of the tensor."""
    count = len(values)
    gram = np.zeros((count, count))
    for _first, thetas, base in whole.blocks():
        assert base is not None
        deltas = [theta - base for theta in thetas]
        for i in range(count):
            for j in range(i + 1):
                gram[i, j] += ops.dots(deltas[i], deltas[j])[2]
    gram += np.tril(gram, -1).T
    steps = np.array([value["step"] for value in values])
    return Track(tuple(track_weights(gram, steps, shared["to_step"]).tolist()))


def track_weights(gram: Array, steps: Array, to_step: float) -> Array:
    """What every Δ of a run counts for at another step (RELEX, arXiv 2605.21468).

    With M the matrix whose row i is Δᵢ, and its largest singular value σ with vectors u and v: the places
    c = Mv = σu of the checkpoints along v lie on a line in the steps, whose value at `to_step`, times
    v = Mᵀu/σ, is Σ wᵢΔᵢ.

    Args:
        gram: ⟨Δᵢ, Δⱼ⟩, float64 of shape (checkpoints, checkpoints).

    Raises:
        SpecError: all steps are the same.
    """
    values, vectors = np.linalg.eigh(gram)
    if values[-1] <= 0:
        return np.zeros(len(steps))
    sigma, u = math.sqrt(values[-1]), vectors[:, -1]
    away = steps - steps.mean()
    if not away.any():
        raise SpecError(
            "relex: the models are of one step: give each its own, with parameters: {step: …}"
        )
    slope = sigma * (away @ u) / (away @ away)
    return (sigma * u.mean() + slope * (to_step - steps.mean())) * u / sigma


@dataclass(frozen=True)
class Method:
    """A merge method, and the paper or code that it comes from.

    `each` are parameters of a model, `shared` of the merge; `models` how many it takes. `prepare` looks at
    whole tensors first; `sparsifier` chooses the elements of every Δ that stay, where density is below 1.
    """

    paper: str
    formula: Formula
    base: Base
    each: Mapping[str, Default] = field(default_factory=dict)
    shared: Mapping[str, Default] = field(default_factory=dict)
    models: tuple[int, int | None] = (1, None)
    sparsifier: Sparsifier | None = None
    elects_sign: bool = False
    prepare: Prepare | None = None


def _arithmetic(
    paper: str,
    sparsifier: Sparsifier | None = None,
    *,
    elects_sign: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    **each: Default,
) -> Method:
    """A method that adds task vectors."""
    return Method(
        paper,
        task_vectors,
        "required",
        {"weight": None, "density": 1.0, **each},
        {"normalize": normalize, "rescale": rescale, "lambda": 1.0},
        sparsifier=sparsifier,
        elects_sign=elects_sign,
    )


METHODS: dict[str, Method] = {
    "expo": Method("ExPO, arXiv 2404.16792", extrapolation, "required", {"alpha": None}),
    "linear": Method("model soups, arXiv 2203.05482", mean, "operand", {"weight": None}, {"normalize": True}),
    "task_arithmetic": _arithmetic("task arithmetic, arXiv 2212.04089"),
    "ties": _arithmetic("TIES, arXiv 2306.01708", "magnitude", elects_sign=True, normalize=True),
    "dare_linear": _arithmetic("DARE, arXiv 2311.03099", "random", rescale=True),
    "dare_ties": _arithmetic("DARE and TIES", "random", elects_sign=True, rescale=True),
    "della_linear": _arithmetic("DELLA, arXiv 2406.11617", "ranked", rescale=True, epsilon=0.15),
    "della": _arithmetic("DELLA and TIES", "ranked", elects_sign=True, normalize=True, rescale=True, epsilon=0.15),
    "breadcrumbs": _arithmetic("breadcrumbs, arXiv 2312.06795", "outliers", gamma=0.01),
    "breadcrumbs_ties": _arithmetic("breadcrumbs and TIES", "outliers", elects_sign=True, gamma=0.01),
    "slerp": Method("Shoemake 1985", slerp, "required", {}, {"t": None}, (1, 1), prepare=slerp_arc),
    "nuslerp": Method("mergekit's NuSLERP", nuslerp, "optional", {"weight": None}, {"nuslerp_row_wise": False, "nuslerp_flatten": True}, (2, 2), prepare=nuslerp_arc),
    "passthrough": Method("mergekit", scaled, "operand", {"scale": 1.0}, {}, (1, 1)),
    "relex": Method("RELEX, arXiv 2605.21468", along_track, "required", {"step": None}, {"to_step": None}, (2, None), prepare=relex_track),
}  # fmt: skip

NOT_IN_MERGEKIT = ("expo", "relex")


@dataclass(frozen=True)
class Transform:
    """What can be done to every Δ of an ExPO before it is scaled; `each` are its parameters."""

    sparsifier: Sparsifier
    each: Mapping[str, Default]
    elects_sign: bool = False


TRANSFORMS: dict[str, Transform] = {
    "magnitude": Transform("magnitude", {"density": None}),
    "dare": Transform("random", {"density": None, "rescale": True}),
    "della": Transform("ranked", {"density": None, "epsilon": 0.15, "rescale": True}),
    "breadcrumbs": Transform("outliers", {"density": None, "gamma": 0.01}),
    "ties": Transform("magnitude", {"density": 1.0}, elects_sign=True),
}

WITHOUT_EFFECT = frozenset({"int8_mask"})
"""Parameters that mergekit's users write and that change nothing here: computed in float32 anyway."""

IN_MERGEKIT = (
    "multislerp", "karcher", "model_stock", "nearswap", "arcee_fusion", "sce", "ram", "ramplus_tl",
)  # fmt: skip
"""Methods that run through the mergekit library."""
