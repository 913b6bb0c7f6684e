"""The compiled kernels for several models against the torch operators, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from expo.compute import masks, mixing
from expo.compute.kernels import draws
from expo.compute.masks import Mask
from expo.operators import merging, sparsify
from expo.operators.rounding import uniform_draws

SHAPES = [(1, 1), (1, 700), (37, 48), (9, 2231)]


def deltas(shape: tuple[int, int], kind: str = "weights") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 1e-3
    match kind:
        case "ties":
            values = (values * 2e3).round()  # few magnitudes, so many are equal
        case "zeros":
            values[:, ::2] = -0.0
        case "all zero":
            values[:] = 0.0
    return values


def uniform(count: int, name: str = "a.weight#1") -> Tensor:
    return uniform_draws(3, name, 0, count).float() / 2.0**24


def flat(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).numpy()


def kept(mask: Mask, delta: Tensor) -> Tensor:
    """What a mask keeps, asked for in two parts."""
    values = flat(delta)
    middle = len(values) // 3
    parts = [
        masks.kept_elements(part, mask, begin=begin)
        for part, begin in ((values[:middle], 0), (values[middle:], middle))
    ]
    return torch.from_numpy(np.concatenate(parts)).bool().reshape(delta.shape)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["weights", "ties", "zeros", "all zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_keep_what_the_operators_keep(
    shape: tuple[int, int], kind: str, density: float
) -> None:
    delta, drawn = deltas(shape, kind), draws(3, "a.weight#1", 0)
    values, u = flat(delta), uniform(delta.numel()).reshape(shape)
    pairs = [
        (masks.magnitude_mask(values, density), sparsify.magnitude_mask(delta, density)),
        (masks.random_mask(drawn, density), sparsify.random_mask(u, density)),
        (
            masks.ranked_mask(values, shape[1], drawn=drawn, density=density, epsilon=0.05),
            sparsify.ranked_mask(delta, u, density, 0.05),
        ),
    ]
    pairs.append((masks.bit_mask(pairs[0][1].numpy()), pairs[0][1]))
    for gamma in (0.0, 0.01, 0.6):
        mask = masks.outlier_mask(values, density, gamma)
        pairs.append((mask, sparsify.outlier_mask(delta, density, gamma)))
    for mask, want in pairs:
        assert torch.equal(kept(mask, delta), want)


@pytest.mark.parametrize("count", [1, 513, 20_011])
def test_magnitudes_are_summed_in_float64(count: int) -> None:
    delta = deltas((1, count))
    drawn = sparsify.random_mask(uniform(count), 0.3)
    mask = masks.random_mask(draws(3, "a.weight#1", 0), 0.3)
    before, after = masks.magnitude_sums(flat(delta), mask, begin=0)
    assert before == pytest.approx(float(delta.double().abs().sum()), rel=1e-12)
    assert after == pytest.approx(float((delta.double().abs() * drawn).sum()), rel=1e-12)
    want = sparsify.norm_ratio(delta, drawn[None])
    assert masks.norm_ratio(before, after) == pytest.approx(want, rel=1e-12)


def test_nothing_left_is_not_scaled() -> None:
    assert masks.norm_ratio(1.0, 0.0) == masks.norm_ratio(0.0, 0.0) == 1.0


COUNT = 2500
WEIGHTS = [[0.3], [0.5, -0.2], [1.0, -1.0], [0.5, 0.3, 0.4], [0.0, 1.0, 0.0]]


def models(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What they start from, their base, and models that agree with it or disagree in places."""
    rng = np.random.default_rng(number)
    start, base = rng.standard_normal((2, COUNT)).astype(np.float32)
    thetas = base + rng.standard_normal((number, COUNT)).astype(np.float32) * np.float32(0.1)
    thetas[:, ::5] = base[::5]
    thetas[0, ::3] = 2 * base[::3] - thetas[-1, ::3]
    start[::10] = -0.0
    return start, base, thetas


def some_masks(delta: np.ndarray, number: int) -> Mask:
    drawn = draws(3, f"a.weight#{number}", 0)
    return [
        masks.magnitude_mask(delta, 0.4)._replace(ratio=1.7),
        masks.ranked_mask(delta, COUNT, drawn=drawn, density=0.4, epsilon=0.1),
        masks.random_mask(drawn, 0.4)._replace(ratio=2.4),
    ][number]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("elect", "normalize"), [*itertools.product((False, True), repeat=2)])
def test_terms_are_added_as_the_operators_do(
    weights: list[float], masked: bool, elect: bool, normalize: bool
) -> None:
    start, base, thetas = models(len(weights))
    changes = [theta - base for theta in thetas]
    each = [some_masks(d, n) if masked else Mask() for n, d in enumerate(changes)]
    tensors = [
        torch.from_numpy(d) * kept(mask, torch.from_numpy(d)) * mask.ratio
        for d, mask in zip(changes, each, strict=True)
    ]
    out, delta = np.empty((2, COUNT), np.float32)
    for scale in (1.0, 0.7):
        want = merging.add_task_vectors(
            torch.from_numpy(start), tensors, weights,
            elect_sign=elect, normalize=normalize, scale=scale,
        )  # fmt: skip
        for part in (slice(0, 1544), slice(1544, COUNT)):
            mixing.add_terms(
                start[part], base[part], np.ascontiguousarray(thetas[:, part]), weights,
                masks.masks(each), begin=part.start, elect_sign=elect, normalize=normalize,
                scale=scale, exact_out=out[part], delta_out=delta[part],
            )  # fmt: skip
        assert np.array_equal(out.view(np.int32), want.numpy().view(np.int32))
    whole = changes[0]
    for change in changes[1:]:
        whole = whole + change
    assert np.array_equal(delta.view(np.int32), whole.view(np.int32))
