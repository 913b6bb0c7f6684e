"""What a combination computes: facts about whole tensors first, then block by block."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Weight
from expo.operators.merging import (
    add_task_vectors,
    arc,
    linear,
    nuslerp_coefficients,
    slerp_coefficients,
)
from expo.operators.rounding import uniform_draws
from expo.operators.sparsify import (
    magnitude_mask,
    norm_ratio,
    outlier_mask,
    random_mask,
    ranked_mask,
)
from expo.operators.statistics import Summing
from expo.planning.chunks import BLOCK_ELEMENTS
from expo.planning.plan import Combination, TensorJob

Load = Callable[[Weight], Tensor]

_DRAW_STEPS = 2.0**24


@dataclass(frozen=True)
class Mask:
    """Which elements of a delta stay, one bit each, and what they are multiplied by."""

    bits: np.ndarray
    ratio: float

    def apply(self, delta: Tensor, begin: int) -> Tensor:
        """`delta` holds the elements from `begin`, which is a multiple of 8."""
        packed = self.bits[begin // 8 : -(-(begin + delta.numel()) // 8)]
        kept = torch.from_numpy(np.unpackbits(packed, count=delta.numel())).view(torch.bool)
        masked = delta * kept
        return masked if self.ratio == 1.0 else masked * self.ratio


@dataclass(frozen=True)
class EditedMatrix:
    """What an edit made of a matrix, its elements from `begin` on: the Δ of every term, or the result."""

    begin: int
    deltas: tuple[Tensor, ...] = ()
    result: Tensor | None = None


@dataclass(frozen=True)
class Combined:
    """A block: the exact result, what it started from, Δ (ΣΔᵢ for ExPO, else the intended change),
    and the model from which an element "did not move"."""

    exact: Tensor
    start: Tensor
    delta: Tensor
    still: Tensor


@dataclass(frozen=True)
class Prepared:
    """What a block needs to know of the whole tensor."""

    masks: tuple[Mask | None, ...] = ()
    coefficients: tuple[Tensor, Tensor] | None = None
    is_by_column: bool = False

    def coefficient(self, which: int, begin: int, count: int, width: int) -> Tensor:
        """Of a or b, for the elements from `begin`; `width` elements share one, or repeat them."""
        assert self.coefficients is not None
        values = self.coefficients[which]
        if values.numel() == 1:
            return values
        places = torch.arange(begin, begin + count)
        return values[places % values.numel() if self.is_by_column else places // width]


def prepare(job: TensorJob, seed: int, whole: Load) -> Prepared:
    """Read whole tensors (`whole` of a weight, in the working precision) and draw what is needed."""
    combination = job.combination
    assert combination is not None
    if combination.method in ("slerp", "nuslerp"):
        return _prepare_arc(combination, whole)
    assert combination.base is not None
    base = whole(combination.base)
    masks: list[Mask | None] = []
    for number, term in enumerate(combination.terms):
        density = term.parameters.get("density", 1.0)
        if density >= 1:
            masks.append(None)
            continue
        delta = whole(term.weight).sub_(base)
        mask = _mask(job, number, delta, combination, seed)
        ratio = norm_ratio(delta, mask) if combination.shared.get("rescale") else 1.0
        masks.append(Mask(np.packbits(mask.reshape(-1).numpy()), ratio))
    return Prepared(tuple(masks))


def combine(
    combination: Combination,
    load: Load,
    prepared: Prepared | None,
    begin: int,
    width: int,
    edited: Sequence[EditedMatrix] = (),
) -> Combined:
    """One block.

    Args:
        load: gives the block of a weight in the working precision.
        begin: the first element of the block in the tensor; `width`: elements of its last axis.
        edited: the edited matrices that reach into the block.
    """
    done = _combine(combination, load, prepared, begin, width, edited)
    results = [(one.begin, one.result) for one in edited if one.result is not None]
    if not results:
        return done
    exact = _overlaid(done.exact, begin, results)
    if combination.method == "expo":
        return replace(done, exact=exact)
    return replace(done, exact=exact, delta=exact - done.start)  # the edit is a part of the change


def _overlaid(values: Tensor, begin: int, parts: Iterable[tuple[int, Tensor]]) -> Tensor:
    """`values`, elements from `begin`, replaced where `parts` (first element, values) reach."""
    overlaid = values.clone()
    for start, part in parts:
        first, end = max(begin, start), min(begin + values.numel(), start + part.numel())
        if first < end:
            overlaid[first - begin : end - begin] = part[first - start : end - start]
    return overlaid


def _combine(
    combination: Combination,
    load: Load,
    prepared: Prepared | None,
    begin: int,
    width: int,
    edited: Sequence[EditedMatrix],
) -> Combined:
    thetas = [load(term.weight) for term in combination.terms]
    values = [term.parameters for term in combination.terms]
    shared = combination.shared
    start = thetas[0] if combination.start is None else load(combination.start)
    match combination.method:
        case "linear":
            weights = [value["weight"] for value in values]
            exact = linear(thetas, weights, normalize=bool(shared["normalize"]))
        case "passthrough":
            exact = thetas[0] * values[0]["scale"]
        case "slerp" | "nuslerp":
            exact = _arc(combination, load, thetas, prepared, begin, width)
        case _:
            return _arithmetic(combination, load, thetas, start, prepared, begin, edited)
    return Combined(exact, start, exact - start, start)


def _arithmetic(
    combination: Combination,
    load: Load,
    thetas: list[Tensor],
    start: Tensor,
    prepared: Prepared | None,
    begin: int,
    edited: Sequence[EditedMatrix],
) -> Combined:
    assert combination.base is not None
    base = load(combination.base)
    deltas = [theta - base for theta in thetas]
    masks = prepared.masks if prepared else (None,) * len(deltas)
    kept = [d if m is None else m.apply(d, begin) for d, m in zip(deltas, masks, strict=True)]
    if any(one.deltas for one in edited):
        kept = [
            _overlaid(d, begin, [(one.begin, one.deltas[n]) for one in edited if one.deltas])
            for n, d in enumerate(kept)
        ]
    is_expo = combination.method == "expo"
    exact = add_task_vectors(
        start,
        kept,
        [term.parameters["alpha" if is_expo else "weight"] for term in combination.terms],
        elect_sign=combination.elects_sign,
        normalize=bool(combination.shared.get("normalize")),
        scale=combination.shared.get("lambda", 1.0),
    )
    if not is_expo:
        return Combined(exact, start, exact - start, start)
    whole = deltas[0]
    for delta in deltas[1:]:
        whole = whole + delta
    return Combined(exact, start, whole, thetas[0])


def _mask(
    job: TensorJob, number: int, delta: Tensor, combination: Combination, seed: int
) -> Tensor:
    values = combination.terms[number].parameters
    density = values["density"]
    match combination.sparsifier:
        case "magnitude":
            return magnitude_mask(delta, density)
        case "outliers":
            return outlier_mask(delta, density, values["gamma"])
    mask = torch.empty(delta.shape, dtype=torch.bool)
    begin = 0
    # Row by row they are independent, so that the draws need room for some rows only.
    for part, kept in zip(_rows(delta), _rows(mask), strict=True):
        integers = uniform_draws(seed, f"{job.name}#{number}", begin, part.numel())
        draws = (integers.float() / _DRAW_STEPS).view(part.shape)  # exact: 24 bits
        if combination.sparsifier == "random":
            kept.copy_(random_mask(draws, density))
        else:
            kept.copy_(ranked_mask(part, draws, density, values["epsilon"]))
        begin += part.numel()
    return mask


def _rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """Some whole rows at a time; a vector is one row."""
    if tensor.ndim < 2:
        return (tensor,)
    return tensor.split(max(1, BLOCK_ELEMENTS // max(tensor[0].numel(), 1)))


def _prepare_arc(combination: Combination, whole: Load) -> Prepared:
    if combination.method == "slerp":
        assert combination.base is not None
        a, b = whole(combination.base), whole(combination.terms[0].weight)
        flat_a, flat_b = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        dot = Summing(flat_a.size, flat_a.dtype).dot
        norm_a, norm_b = (math.sqrt(dot(x, x)) for x in (flat_a, flat_b))
        pair = slerp_coefficients(norm_a, norm_b, dot(flat_a, flat_b), combination.shared["t"])
        one, two = (torch.tensor([value], dtype=a.dtype) for value in pair)
        return Prepared(coefficients=(one, two))
    a, b = (whole(term.weight) for term in combination.terms)
    if combination.base is not None:
        base = whole(combination.base)
        a, b = a.sub_(base), b.sub_(base)
        del base
    by_column = bool(combination.shared["nuslerp_row_wise"])
    flat = bool(combination.shared["nuslerp_flatten"])
    dim = None if flat else 0 if by_column else -1
    one, two = nuslerp_coefficients(a, b, _share(combination), dim)
    return Prepared((), (one.reshape(-1), two.reshape(-1)), by_column and not flat)


def _share(combination: Combination) -> float:
    """How far from the first model to the second: w₂ / (w₁ + w₂)."""
    weights = [term.parameters["weight"] for term in combination.terms]
    total = sum(weights)
    return 0.5 if abs(total) < 1e-6 else weights[1] / total


def _arc(
    combination: Combination,
    load: Load,
    thetas: list[Tensor],
    prepared: Prepared | None,
    begin: int,
    width: int,
) -> Tensor:
    assert prepared is not None
    if combination.method == "slerp":
        assert combination.base is not None
        a, b, origin = load(combination.base), thetas[0], None
    elif combination.base is not None:
        origin = load(combination.base)
        a, b = thetas[0] - origin, thetas[1] - origin
    else:
        (a, b), origin = thetas, None
    coefficients = [prepared.coefficient(which, begin, a.numel(), width) for which in (0, 1)]
    exact = arc(a, b, coefficients[0], coefficients[1])
    return exact if origin is None else origin + exact
