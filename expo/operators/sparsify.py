"""Which elements of a delta stay: masks over whole tensors, float32 in, booleans out.

Equal magnitudes are taken in the order of the elements, so a mask is a function of its inputs alone.
"""

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements of a histogram's part: what it needs stays in the processor's cache


def magnitude_mask(delta: Tensor, density: float) -> Tensor:
    """The `density` share of the elements with the largest magnitude (TIES, arXiv 2306.01708)."""
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    if density <= 0 or not delta.numel():
        return torch.zeros_like(delta, dtype=torch.bool)
    return _smallest(delta, delta.numel() - max(1, int(density * delta.numel()))).logical_not_()


def outlier_mask(delta: Tensor, density: float, gamma: float) -> Tensor:
    """As many, without the `gamma` share of the very largest (breadcrumbs, arXiv 2312.06795)."""
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    count = delta.numel()
    kept, top = int(density * count), int(gamma * count)
    bottom = max(0, count - kept - top)
    return _smallest(delta, bottom).logical_not_() & _smallest(delta, bottom + kept)


def random_mask(draws: Tensor, density: float) -> Tensor:
    """Each element with probability `density` (DARE, arXiv 2311.03099); draws are uniform in [0, 1)."""
    return draws < density


def ranked_mask(delta: Tensor, draws: Tensor, density: float, epsilon: float) -> Tensor:
    """Each element with a probability that grows with its rank in the row, from density − ε to
    density + ε (DELLA's MagPrune, arXiv 2406.11617)."""
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    rows = delta.abs().reshape(1, -1) if delta.ndim < 2 else delta.abs()
    order = rows.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order)
    places = torch.arange(rows.shape[1]).view(1, -1, *(1,) * (rows.ndim - 2)).expand_as(order)
    ranks.scatter_(1, order, places)
    share = ranks.float() / max(rows.shape[1] - 1, 1)
    return (draws.reshape(rows.shape) < density - epsilon + 2 * epsilon * share).reshape(
        delta.shape
    )


def norm_ratio(delta: Tensor, mask: Tensor) -> float:
    """What the kept elements are multiplied by, so that ‖Δ‖₁ stays; 1 where nothing is left."""
    magnitudes = delta.abs().numpy()
    before = float(magnitudes.sum(dtype=np.float64))
    after = float(np.multiply(magnitudes, mask.numpy(), out=magnitudes).sum(dtype=np.float64))
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


def _smallest(delta: Tensor, count: int) -> Tensor:
    """The `count` elements of smallest magnitude; of equal ones the first stay larger."""
    flat = delta.abs().reshape(-1)
    if count <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(delta, dtype=torch.bool)
    limit = _kth_smallest(flat, count)
    mask = flat <= limit
    if excess := int(np.count_nonzero(mask.numpy())) - count:
        mask[torch.nonzero(flat == limit).view(-1)[:excess]] = False
    return mask.reshape(delta.shape)


def _kth_smallest(magnitudes: Tensor, k: int) -> float:
    """The k-th smallest, from 1, of many non-negative numbers.

    The bits of non-negative floats sort like the floats: one histogram of the upper half of the bits
    leaves few candidates to look at. torch.kthvalue takes three times as long and twice the memory.
    """
    if magnitudes.dtype != torch.float32:
        return float(magnitudes.kthvalue(k).values)
    bits = magnitudes.numpy().view(np.uint32)
    blocks = [bits[at : at + _BLOCK] for at in range(0, len(bits), _BLOCK)]
    counts = np.zeros(1 << 16, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(block >> 16, minlength=1 << 16)
    below = counts.cumsum()
    bucket = int(np.searchsorted(below, k))
    rank = k - 1 - (int(below[bucket - 1]) if bucket else 0)
    candidates = np.concatenate([block[block >> 16 == bucket] for block in blocks])
    return float(np.partition(candidates, rank)[rank : rank + 1].view(np.float32)[0])
