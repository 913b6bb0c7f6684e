"""Spectra with the bulk that noise alone would have, and a map of where the signal is."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from expo.planning.modules import module_of
from expo.plots.heatmap import draw_map, map_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from expo.results import MatrixSpectrum

_SHOWN = 4
_BINS = 40


def spectra_figure(
    result: "tuple[MatrixSpectrum, ...]", values: "Mapping[str, Tensor]", title: str
) -> "Figure":
    """The spectra of the matrices with the highest SNR, and SNR by layer and module.

    Args:
        values: singular values by label, of every matrix in `result`.
    """
    from matplotlib.figure import Figure

    cells: dict[tuple[int | None, str], float | None] = {}
    for one in result:
        place = module_of(one.tensor)
        cells[place] = max(cells.get(place) or 0.0, one.snr_mp or 0.0)
    width, height = map_size(cells)
    figure = Figure(figsize=(max(width, 10.0), height + 3.0), layout="constrained")
    halves = figure.subfigures(2, 1, height_ratios=[3.0, height])
    assert isinstance(halves, np.ndarray)
    upper, lower = halves
    ranked = sorted(result, key=lambda one: -(one.snr_mp or 0.0))[:_SHOWN]
    for axes, one in zip(np.atleast_1d(upper.subplots(1, len(ranked))), ranked, strict=True):
        _draw_spectrum(axes, one, values[one.tensor].numpy())
    upper.suptitle(title, fontsize=10)
    draw_map(lower.subplots(), cells, "SNR: ΣS² above the edge / below")
    return figure


def _draw_spectrum(axes: "Axes", one: "MatrixSpectrum", values: np.ndarray) -> None:
    """Counts over logarithmic bins: the bulk and what stands out of it have room side by side."""
    shown = values[values > values[0] * 1e-4]
    bins = np.geomspace(shown[-1] * 0.99, shown[0] * 1.01, _BINS + 1) if len(shown) else _BINS
    axes.hist(shown, bins=bins, color="#8fb8de", label="singular values")
    x, density = _bulk(one)
    inside = int((values <= one.mp_edge).sum())
    per_bin = math.log(values[0] / shown[-1] + 1e-9) / _BINS if len(shown) else 0.0
    axes.plot(x, inside * density * x * per_bin, color="#1b4965", lw=1.2, label="noise alone")
    axes.axvline(one.mp_edge, color="#c1121f", lw=1.0, ls="--", label="edge")
    axes.set_xscale("log")
    if len(shown):
        axes.set_xlim(shown[-1] * 0.8, shown[0] * 1.3)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.4)  # room for the legend
    fit = "–" if one.bulk_fit is None else f"{one.bulk_fit:.3f}"
    name = one.tensor.removesuffix(".weight").removeprefix("model.")
    axes.set_title(f"{name}\n{one.rank_mp} above the edge, bulk fit {fit}", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, loc="upper left")


def _bulk(one: "MatrixSpectrum") -> tuple[np.ndarray, np.ndarray]:
    """The Marchenko–Pastur density of singular values for the matrix's noise level."""
    m, n = sorted(one.shape)
    scale = max(one.noise_sigma, 1e-300) * math.sqrt(n)
    low, high = 1.0 - math.sqrt(m / n), 1.0 + math.sqrt(m / n)
    s = np.linspace(max(low, 1e-6), high, 400)
    inner = np.clip((high**2 - s**2) * (s**2 - low**2), 0.0, None)
    return s * scale, np.sqrt(inner) / (math.pi * (m / n) * s) / scale
