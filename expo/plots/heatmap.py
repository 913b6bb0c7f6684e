"""The relative change of every module in every layer, as a heat map."""

import math
import re
from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from expo.checkpoint.shown import visible
from expo.errors import ExpoError, SpecError
from expo.output.durable import unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from expo.results import DiffResult


def check_plot(path: Path) -> None:
    """Refuse before the work what could not be drawn after it.

    Raises:
        SpecError: not a .png or .svg. ExpoError: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise SpecError(f"{path}: a plot is written as .png or .svg")
    if find_spec("matplotlib") is None:
        raise ExpoError("plots need matplotlib: pip install 'expo-merge[plot]'")


Cells = Mapping[tuple[int | None, str], float | None]
"""A number for every (layer, module), None where there is none to show."""


def draw_heatmap(result: "DiffResult", path: Path) -> None:
    """Write the heat map of `result` to `path`.

    Raises:
        OutputError: the file cannot be written.
    """
    save(heatmap(result), path)


def heatmap(result: "DiffResult") -> "Figure":
    """The heat map of what changed between two checkpoints."""
    cells = {(m.layer, m.module): m.statistics.relative_delta for m in result.modules}
    between = "\n" if len(result.a) + len(result.b) > _TITLE else " "
    return change_map(cells, f"{result.a}{between}→ {result.b}")


def change_map(cells: Cells, pair: str) -> "Figure":
    """Layers from left to right, modules from top to bottom, colour is ‖Δ‖/‖θ‖ on a log scale; `pair` names
    the models in the title."""
    from matplotlib.figure import Figure

    cells = folded(cells)
    figure = Figure(figsize=map_size(cells), layout="constrained")
    draw_map(figure.subplots(), cells, "‖Δ‖ / ‖θ‖", zero="unchanged")
    names = "\n".join(caption(line, 2 * _TITLE) for line in pair.split("\n"))
    figure.suptitle(f"Relative change of every module\n{names}", fontsize=10)
    return figure


def caption(text: str, limit: int = 50) -> str:
    """A text from outside: what does not show as an escape, not too long, and no part of it set as a formula."""
    shown = visible(text)
    return (shown if len(shown) <= limit else f"{shown[: limit - 1]}…").replace("$", r"\$")


_ROWS = 40
_TITLE = 66  # characters of a line above the smallest map
_ZERO, _ABSENT = "#bdbdbd", "white"


def folded(cells: Cells) -> Cells:
    """The cells, and where they are too many to look at one row for all experts: their median."""
    if len({module for _, module in cells}) <= _ROWS:
        return cells
    experts: dict[tuple[int | None, str], list[float]] = {}
    for (layer, module), value in cells.items():
        name = re.sub(r"experts\.\d+\.", "experts.*.", re.sub(r"\[\d+\]", "[*]", module))
        known = experts.setdefault((layer, name), [])
        known += [] if value is None else [value]
    return {place: median(values) if values else None for place, values in experts.items()}


def map_size(cells: Cells) -> tuple[float, float]:
    """Width and height in inches that a map of these cells needs."""
    columns, rows = len({layer for layer, _ in cells}), len({module for _, module in cells})
    return min(max(6.4, 3.2 + 0.28 * columns), 14.0), 1.9 + 0.3 * max(rows, 3)


def draw_map(
    axes: "Axes", cells: Cells, label: str, *, zero: str = "0", absent: str = "no such tensor"
) -> None:
    """Layer × module on a log scale, with a colour bar; what is 0 is grey, what is not there is hatched.

    Args:
        zero, absent: what 0 means, and what it means that there is no number.
    """
    from matplotlib.colors import ListedColormap, LogNorm

    modules, columns, values = _grid(cells)
    axes.set_facecolor(_ABSENT)
    axes.patch.set(hatch="////", edgecolor="#d9d9d9", linewidth=0)
    grey = np.where(values == 0, 0.0, np.nan)
    axes.imshow(grey, cmap=ListedColormap([_ZERO]), aspect="auto", interpolation="nearest")
    shown = np.where(values > 0, values, np.nan)
    if np.isfinite(shown).any():
        low, high = color_range(float(np.nanmin(shown)), float(np.nanmax(shown)))
        norm = LogNorm(low, high)
        image = axes.imshow(
            shown, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest"
        )
        bar = axes.figure.colorbar(image, ax=axes, label=label)
        set_log_ticks(bar.ax.yaxis, low, high)
    _name_axes(axes, modules, columns)
    _explain(axes, zero * bool((values == 0).any()), absent * bool(np.isnan(values).any()))


def color_range(low: float, high: float) -> tuple[float, float]:
    """A decade at least: what hardly differs should look so."""
    middle, half = math.sqrt(low * high), max(math.sqrt(high / low), math.sqrt(10.0))
    return middle / half, middle * half


def set_log_ticks(axis: "Axis", low: float, high: float) -> None:
    """A few plain numbers along a log scale, far enough apart to be read."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) <= _TICKS:
            break
    ticks = ticks[:: -(-len(ticks) // _TICKS)] if ticks else [low, high]
    axis.set_ticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_ticks([], minor=True)


_TICKS = 6


def _grid(cells: Cells) -> tuple[list[str], list[int | None], np.ndarray]:
    """Row names, columns and values [rows, columns]; NaN where there is nothing."""
    modules = list(dict.fromkeys(module for _, module in cells))
    columns: list[int | None] = [*sorted({layer for layer, _ in cells if layer is not None})]
    if any(layer is None for layer, _ in cells):
        columns.append(None)
    values = np.full((len(modules), len(columns)), np.nan)
    for (layer, module), value in cells.items():
        if value is not None:
            values[modules.index(module), columns.index(layer)] = value
    return modules, columns, values


def _name_axes(axes: "Axes", modules: list[str], columns: list[int | None]) -> None:
    axes.set_yticks(range(len(modules)), [*map(caption, modules)], fontsize=8)
    axes.set_ylabel("module")
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if len(columns) <= 18 * s)
    layers = len(columns) - (None in columns)
    outside = layers if None in columns else None
    # the name of the last column takes room of its own
    ticks = [n for n in range(0, layers, step) if outside is None or outside - n >= 0.75 * step]
    names = [str(columns[n]) for n in ticks]
    if outside is not None:
        ticks, names = [*ticks, outside], [*names, "outside"]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_xlabel("layer")


def _explain(axes: "Axes", zero: str, absent: str) -> None:
    """What grey and hatched cells mean, below the map; empty where there are none."""
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=_ZERO, label=zero)] if zero else []
    if absent:
        patches.append(Patch(facecolor=_ABSENT, edgecolor="#b0b0b0", hatch="////", label=absent))
    if patches:
        axes.figure.legend(
            handles=patches, loc="outside lower left", ncols=2, fontsize=8, frameon=False
        )


def png(figure: "Figure") -> bytes:
    """A figure as the bytes of a PNG file: the same for the same figure."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def save(figure: "Figure", path: Path) -> None:
    """Write a figure.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise unwritable(error, path) from error
