"""Spectra with the bulk that noise alone would have, and a map of where the signal is."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from expo.planning.modules import module_of
from expo.plots.heatmap import caption, draw_map, folded, map_size, set_log_ticks

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

    cells = folded(_best(result))
    width, height = map_size(cells)
    ranked = sorted(result, key=_signal, reverse=True)[:_SHOWN]
    width = max(width, 2.6 * len(ranked) + 0.6)
    figure = Figure(figsize=(width, height + 3.6), layout="constrained")
    halves = figure.subfigures(2, 1, height_ratios=[3.2, height])
    assert isinstance(halves, np.ndarray)
    upper, lower = halves
    places = np.atleast_1d(upper.subplots(1, len(ranked)))
    for axes, one in zip(places, ranked, strict=True):
        _draw_spectrum(axes, one, values[one.tensor].numpy())
    places[0].set_ylabel("how many", fontsize=8)
    if places[0].get_legend_handles_labels()[0]:  # none where every value is 0
        places[0].legend(fontsize=7, loc="upper left")
    figure.suptitle(caption(title, 130), fontsize=10)
    axes = lower.subplots()
    axes.set_title("SNR of every matrix: ΣS² above the edge / ΣS² below", fontsize=9)
    absent = "no such matrix, or nothing below the edge"
    draw_map(axes, cells, "SNR", zero="nothing above the edge", absent=absent)
    return figure


def _signal(one: "MatrixSpectrum") -> float:
    """SNR, without end where nothing lies below the edge."""
    return math.inf if one.snr_mp is None else one.snr_mp


def _best(result: "tuple[MatrixSpectrum, ...]") -> dict[tuple[int | None, str], float | None]:
    """The highest SNR by layer and module, None where only one without end is known."""
    cells: dict[tuple[int | None, str], float | None] = {}
    for one in result:
        place = module_of(one.tensor)
        known = [v for v in (cells.get(place), one.snr_mp) if v is not None]
        cells[place] = max(known, default=None)
    return cells


def _draw_spectrum(axes: "Axes", one: "MatrixSpectrum", values: np.ndarray) -> None:
    """Counts over logarithmic bins: the bulk and what stands out of it have room side by side."""
    from matplotlib.ticker import MaxNLocator

    shown = values[values > values[0] * 1e-4]
    layer, module = module_of(one.tensor)
    where = "" if layer is None else f"layer {layer}, "
    fit = "–" if one.bulk_fit is None else f"{one.bulk_fit:.3f}"
    title = f"{where}{one.rank_mp} above the edge, bulk fit {fit}"
    axes.set_title(f"{caption(module.removesuffix('.weight'))}\n{title}", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("singular value", fontsize=8)
    axes.set_xscale("log")
    if not len(shown):
        axes.text(0.5, 0.5, "all 0", transform=axes.transAxes, ha="center", color="#606060")
        axes.set_xticks([], minor=True)
        return
    bins = np.geomspace(shown[-1] * 0.99, shown[0] * 1.01, _BINS + 1)
    axes.hist(shown, bins=bins, color="#8fb8de", label="singular values")
    x, density = _bulk(one)
    inside = int((values <= one.mp_edge).sum())
    per_bin = math.log(values[0] / shown[-1] + 1e-9) / _BINS
    axes.plot(x, inside * density * x * per_bin, color="#1b4965", lw=1.2, label="noise alone")
    axes.axvline(one.mp_edge, color="#c1121f", lw=1.0, ls="--", label="edge")
    low, high = float(shown[-1]) * 0.8, max(float(shown[0]), one.mp_edge) * 1.3
    axes.set_xlim(low, high)
    set_log_ticks(axes.xaxis, low, high)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.45)  # room for the legend
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _bulk(one: "MatrixSpectrum") -> tuple[np.ndarray, np.ndarray]:
    """The Marchenko–Pastur density of singular values for the matrix's noise level."""
    m, n = sorted(one.shape)
    scale = max(one.noise_sigma, 1e-300) * math.sqrt(n)
    low, high = 1.0 - math.sqrt(m / n), 1.0 + math.sqrt(m / n)
    s = np.linspace(max(low, 1e-6), high, 400)
    inner = np.clip((high**2 - s**2) * (s**2 - low**2), 0.0, None)
    return s * scale, np.sqrt(inner) / (math.pi * (m / n) * s) / scale
