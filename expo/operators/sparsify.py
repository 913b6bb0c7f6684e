"""Which elements of a delta stay: masks over whole tensors, float32 in, booleans out.

Equal magnitudes are taken in the order of the elements, so a mask is a function of its inputs alone.
"""

import torch
from torch import Tensor


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
    before = float(delta.abs().sum(dtype=torch.float64))
    after = float(delta.abs().where(mask, torch.zeros(())).sum(dtype=torch.float64))
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


def _smallest(delta: Tensor, count: int) -> Tensor:
    """The `count` elements of smallest magnitude; of equal ones the first stay larger."""
    flat = delta.abs().reshape(-1)
    if count <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(delta, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    mask = flat < limit
    ties = torch.nonzero(flat == limit).view(-1)
    needed = count - int(mask.sum())
    mask[ties[len(ties) - needed :]] = True
    return mask.reshape(delta.shape)
