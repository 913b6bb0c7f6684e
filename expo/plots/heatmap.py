"""The relative change of every module in every layer, as a heat map."""

from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expo.errors import ExpoError, SpecError
from expo.output.durable import unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    return change_map(cells, f"{result.a} → {result.b}")


def change_map(cells: Cells, pair: str) -> "Figure":
    """Layers from left to right, modules from top to bottom, colour is ‖Δ‖/‖θ‖ on a log scale; `pair` names
    the models in the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=map_size(cells), layout="constrained")
    axes = figure.subplots()
    draw_map(axes, cells, "‖Δ‖ / ‖θ‖")
    axes.set_title(f"Relative change ‖Δ‖/‖θ‖ per module\n{pair}", fontsize=10)
    return figure


def map_size(cells: Cells) -> tuple[float, float]:
    """Width and height in inches that a map of these cells needs."""
    columns, rows = len({layer for layer, _ in cells}), len({module for _, module in cells})
    return max(6.0, 2.8 + 0.28 * columns), 1.6 + 0.32 * rows


def draw_map(axes: "Axes", cells: Cells, label: str) -> None:
    """Layer × module on a log scale, with a colour bar; what is not positive stays white."""
    from matplotlib.colors import LogNorm

    modules = list(dict.fromkeys(module for _, module in cells))
    columns: list[int | None] = [*sorted({layer for layer, _ in cells if layer is not None})]
    if any(layer is None for layer, _ in cells):
        columns.append(None)
    values = np.full((len(modules), len(columns)), np.nan)
    for (layer, module), value in cells.items():
        if value:
            values[modules.index(module), columns.index(layer)] = value
    norm = LogNorm() if np.isfinite(values).any() else None
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(modules)), modules, fontsize=8)
    step = max(1, len(columns) // 16)
    ticks = [i for i in range(len(columns)) if columns[i] is None or i % step == 0]
    axes.set_xticks(ticks, ["none" if columns[i] is None else str(columns[i]) for i in ticks])
    axes.set_xlabel("layer")
    axes.figure.colorbar(image, ax=axes, label=label)


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
