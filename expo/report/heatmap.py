"""The relative change of every module in every layer, as a heat map."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expo.errors import ExpoError, OutputError, SpecError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from expo.engine.diff import DiffResult


def check_plot(path: Path) -> None:
    """Refuse before the work what could not be drawn after it.

    Raises:
        SpecError: not a .png or .svg. ExpoError: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise SpecError(f"{path}: a plot is written as .png or .svg")
    if find_spec("matplotlib") is None:
        raise ExpoError("plots need matplotlib: pip install 'expo-merge[plot]'")


def draw_heatmap(result: "DiffResult", path: Path) -> None:
    """Write the heat map of `result` to `path`.

    Raises:
        OutputError: the file cannot be written.
    """
    save(heatmap(result), path)


def heatmap(result: "DiffResult") -> "Figure":
    """Layers from left to right, modules from top to bottom, colour is ‖Δ‖/‖θ‖ on a log scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    modules = list(dict.fromkeys(m.module for m in result.modules))
    layers = sorted({m.layer for m in result.modules if m.layer is not None})
    columns: list[int | None] = [*layers]
    if any(m.layer is None for m in result.modules):
        columns.append(None)
    values = np.full((len(modules), len(columns)), np.nan)
    for m in result.modules:
        relative = m.statistics.relative_delta
        if relative:
            values[modules.index(m.module), columns.index(m.layer)] = relative
    figure = Figure(
        figsize=(max(6.0, 2.8 + 0.28 * len(columns)), 1.6 + 0.32 * len(modules)),
        layout="constrained",
    )
    axes = figure.subplots()
    norm = LogNorm() if np.isfinite(values).any() else None
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(modules)), modules, fontsize=8)
    step = max(1, len(columns) // 16)
    ticks = [i for i in range(len(columns)) if columns[i] is None or i % step == 0]
    axes.set_xticks(ticks, ["none" if columns[i] is None else str(columns[i]) for i in ticks])
    axes.set_xlabel("layer")
    axes.set_title(f"Relative change ‖Δ‖/‖θ‖ per module\n{result.a} → {result.b}", fontsize=10)
    figure.colorbar(image, ax=axes, label="‖Δ‖ / ‖θ‖")
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
