"""Pictures that can be read: names on the axes, ticks and labels apart, 0 and nothing told apart."""

import itertools
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from expo.plots.heatmap import Cells, folded, heatmap
from expo.plots.reward import reward_curve
from expo.plots.spectra import spectra_figure
from expo.results import DeltaStatistics, DiffResult, MatrixSpectrum, ModuleDelta

DENSE = ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(f"block_sparse_moe.experts.{n}.{w}" for n in range(8) for w in ("w1", "w2", "w3"))
OPENCHAT, STARLING = "openchat/openchat-3.5-0106", "Nexusflow/Starling-LM-7B-beta"


def change(relative: float | None) -> DeltaStatistics:
    return DeltaStatistics(1, 1.0, 1.0, relative, 0.0, 1.0)


def compared(layers: int, modules: tuple[str, ...], spread: float = 3.0) -> DiffResult:
    """Norms of layers did not change; embeddings, head and norm lie outside of them."""
    rng = np.random.default_rng(0)
    found = [ModuleDelta(None, name, change(4e-4)) for name in ("embed_tokens", "lm_head", "norm")]
    for layer, name in itertools.product(range(layers), modules):
        value = 0.0 if "norm" in name else 4e-4 * spread ** rng.uniform(-1, 1)
        found.append(ModuleDelta(layer, name, change(value)))
    return DiffResult(OPENCHAT, STARLING, change(1e-3), {}, tuple(found), (), (), (), {}, ())


def spectra(layers: int, modules: tuple[str, ...], scale: float = 0.01) -> Figure:
    values, results = {}, []
    for layer, module in itertools.product(range(layers), modules):
        name = f"model.layers.{layer}.{module}.weight"
        generator = torch.Generator().manual_seed(len(results))
        noise = torch.randn(48, 64, generator=generator, dtype=torch.float64)
        signal = torch.outer(noise[:, 0], noise[0]) / 3
        values[name] = torch.linalg.svdvals(noise + signal) * scale
        edge = scale * (8 + math.sqrt(48))
        snr = 0.2 + layer / 100
        results.append(MatrixSpectrum(name, (48, 64), scale, edge, 1, 1, 30, snr, 0.1, 30.0, 0.03))
    return spectra_figure(tuple(results), values, f"{STARLING} − {OPENCHAT}")


FIGURES = {
    "two layers": lambda: heatmap(compared(2, DENSE)),
    "32 layers": lambda: heatmap(compared(32, DENSE)),
    "80 layers": lambda: heatmap(compared(80, DENSE)),
    "experts": lambda: heatmap(compared(32, EXPERTS)),
    "one spectrum": lambda: spectra(1, ("self_attn.q_proj",)),
    "spectra": lambda: spectra(32, ("self_attn.q_proj", "mlp.up_proj"), 3.7e-5),
    "spectra of experts": lambda: spectra(4, EXPERTS),
}


@cache
def drawn(name: str) -> Figure:
    figure = FIGURES[name]()
    FigureCanvasAgg(figure).draw()
    return figure


def panels(figure: Figure) -> list[Axes]:
    return figure.get_axes()


def masked(image: AxesImage) -> np.ndarray:
    """Where an image shows nothing."""
    return np.ma.getmaskarray(np.ma.asarray(image.get_array()))


def overlaps(boxes: list[Bbox]) -> Iterator[tuple[Bbox, Bbox]]:
    yield from ((a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b))


def extents(texts: list[Text]) -> list[Bbox]:
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("name", FIGURES)
def test_ticks_do_not_overprint(name: str) -> None:
    for axes in panels(drawn(name)):
        for axis in (axes.xaxis, axes.yaxis):
            ticks = axis.get_ticklabels() + axis.get_ticklabels(minor=True)
            assert not list(overlaps(extents(ticks))), [tick.get_text() for tick in ticks]


@pytest.mark.parametrize("name", FIGURES)
def test_titles_stay_on_the_picture_and_apart(name: str) -> None:
    figure = drawn(name)
    width, height = FigureCanvasAgg(figure).get_width_height()
    titles = extents([axes.title for axes in panels(figure)])
    assert not list(overlaps(titles))
    for box in titles:
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_name(name: str) -> None:
    for axes in panels(drawn(name)):
        is_bar = axes.get_label() == "<colorbar>"
        assert is_bar or axes.get_xlabel()
        place = axes.get_subplotspec()
        assert axes.get_ylabel() or (place is not None and not place.is_first_col())


def test_nothing_and_zero_look_different() -> None:
    figure = drawn("32 layers")
    (axes, *_) = panels(figure)
    grey, shown = axes.images
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    norm, head, up = (names.index(n) for n in ("input_layernorm", "lm_head", "mlp.up_proj"))
    assert not masked(grey)[norm, 5]  # unchanged: grey
    assert masked(shown)[norm, 5]
    assert masked(grey)[head, 5]  # not there: the hatched ground
    assert masked(shown)[head, 5]
    assert not masked(shown)[up, 5]
    assert axes.patch.get_hatch()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["unchanged", "no such tensor"]


def test_equal_models_are_grey_without_a_scale() -> None:
    same = [ModuleDelta(n, "mlp.up_proj", change(0.0)) for n in range(3)]
    figure = heatmap(DiffResult("a", "b", change(0.0), {}, tuple(same), (), (), (), {}, ()))
    FigureCanvasAgg(figure).draw()
    assert len(panels(figure)) == 1


def test_what_hardly_differs_looks_so() -> None:
    """0.14 % between the least and the most is one colour, not the whole scale."""
    figure = heatmap(compared(8, DENSE[1:], spread=1.0007))
    norm = panels(figure)[0].images[-1].norm
    assert isinstance(norm, LogNorm)
    assert norm.vmin is not None
    assert norm.vmax is not None
    assert norm.vmax / norm.vmin == pytest.approx(10.0, rel=1e-3)
    assert norm(4e-4) == pytest.approx(0.5, abs=0.01)


def test_many_experts_share_a_row() -> None:
    cells: Cells = {
        (0, f"mlp.experts.{n}.{w}"): float(n) for n in range(128) for w in ("up_proj", "down_proj")
    }
    assert folded(cells) == {(0, f"mlp.experts.*.{w}"): 63.5 for w in ("up_proj", "down_proj")}
    few: Cells = {(0, f"mlp.experts.{n}.up_proj"): 1.0 for n in range(8)}
    assert folded(few) == few


def test_signal_without_noise_is_not_drawn_as_none() -> None:
    """SNR is not defined where nothing lies below the edge: that is no 0."""
    one = MatrixSpectrum("model.layers.0.q_proj.weight", (4, 4), 0.0, 0.0, 4, 4, 4, None, None, 4.0, None)  # fmt: skip
    figure = spectra_figure((one,), {one.tensor: torch.ones(4, dtype=torch.float64)}, "t")
    grey = panels(figure)[-1].images[0]
    assert masked(grey).all()


@pytest.mark.parametrize(
    "points",
    [
        [(0, 0.3), (1, 0.52), (2, 0.63), (3, 0.67), (3.5, 0.66), (4, 0.61), (6, 0.1), (8, 0.02)],
        [(0, 0.3), (1, 0.9), (1.1, 0.95), (1.2, 0.2)],
        [(0, 0.3), (1, 0.52), (1.1, 0.5)],
        [(0, 0.5), (1, 0.4), (1.5, 0.3)],
    ],
)
def test_no_label_lies_on_the_curve(points: list[tuple[float, float]]) -> None:
    figure = reward_curve(points)
    FigureCanvasAgg(figure).draw()
    (axes,) = panels(figure)
    line = axes.transData.transform(points)
    along = [a + (b - a) * t for a, b in itertools.pairwise(line) for t in np.linspace(0, 1, 200)]
    boxes = extents(list(axes.texts))
    assert not list(overlaps(boxes))
    assert not any(box.contains(*point) for box in boxes for point in along)
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for box in boxes for corner in box.corners())
    assert sum("best" in text.get_text() for text in axes.texts) == 1
