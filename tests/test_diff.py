"""`expo diff` against float64, its table, its exit codes and its plot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import expo as door

from .conftest import Pair, Ran, nudged, write_checkpoint


def test_the_statistics_match_float64(pair: Pair) -> None:
    result = door.diff(pair.sft, pair.aligned)
    assert result.same_structure
    for name, statistics in result.tensors.items():
        a, b = (t[name].double() for t in (pair.sft_tensors, pair.aligned_tensors))
        delta = b - a
        assert statistics.elements == a.numel()
        assert statistics.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert statistics.delta_rms == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-6)
        assert statistics.relative_delta == pytest.approx(float(delta.norm() / a.norm()), rel=1e-6)
        assert statistics.zero_share == pytest.approx(float((delta == 0).double().mean()))
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert statistics.cosine == pytest.approx(float(cosine), abs=1e-6)
    modules = {(m.layer, m.module) for m in result.modules}
    assert (1, "self_attn.q_proj") in modules
    assert (None, "lm_head") in modules


def test_the_threads_do_not_matter(pair: Pair, expo: Callable[..., Ran]) -> None:
    outputs = {
        expo("diff", pair.sft, pair.aligned, "--json", "--threads", n, "-q").out for n in (1, 2, 5)
    }
    assert len(outputs) == 1


def test_equal_models(pair: Pair, expo: Callable[..., Ran]) -> None:
    ran = expo("diff", pair.sft, pair.sft, "-q")
    assert ran.code == 0
    assert "100.0 % exactly 0" in ran.out


def test_the_table_ranks_modules_and_places_the_pair(pair: Pair, expo: Callable[..., Ran]) -> None:
    changed = nudged(pair.sft_tensors, scale=1e-4)
    changed["model.layers.1.mlp.up_proj.weight"] = (
        pair.sft_tensors["model.layers.1.mlp.up_proj.weight"] * 2
    )
    write_checkpoint(pair.aligned, changed)
    ran = expo("diff", pair.sft, pair.aligned, "--top", 3, "-q")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert "zephyr SFT→DPO (6e-06)" in lines[1]
    assert "pretrained→SFT (2e-04)" in lines[1]
    assert lines[3].split() == [
        "module",
        "layer",
        "‖Δ‖",
        "relative",
        "RMS",
        "zero",
        "1",
        "−",
        "cos",
    ]
    assert lines[4].startswith("mlp.up_proj")
    assert "1.00e+00" in lines[4]
    assert "more (--top, --json)" in ran.out


def test_another_structure_exits_with_3(pair: Pair, expo: Callable[..., Ran]) -> None:
    changed = nudged(pair.sft_tensors)
    changed["new.weight"] = torch.ones(2).bfloat16()
    changed["model.norm.weight"] = torch.ones(4).bfloat16()
    del changed["lm_head.weight"]
    write_checkpoint(pair.sft, changed)
    ran = expo("diff", pair.sft, pair.aligned, "-q")
    assert ran.code == 3
    assert "only in aligned: lm_head.weight" in ran.out
    assert "only in sft: new.weight" in ran.out
    assert "differs in shape or kind: model.norm.weight" in ran.out
    ran = expo("diff", pair.sft, pair.aligned, "--json", "-q")
    assert ran.code == 3
    assert json.loads(ran.out)["missing"] == ["lm_head.weight"]


def test_an_unreadable_side_exits_with_1(pair: Pair, expo: Callable[..., Ran]) -> None:
    (pair.sft / "model.safetensors").write_bytes(b"")
    assert expo("diff", pair.sft, pair.aligned, "-q").code == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_heat_map(pair: Pair, tmp_path: Path, suffix: str, expo: Callable[..., Ran]) -> None:
    path = tmp_path / f"delta.{suffix}"
    ran = expo("diff", pair.sft, pair.aligned, "--plot", path)
    assert ran.code == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_the_heat_map_shows_the_modules(pair: Pair) -> None:
    from expo.plots.heatmap import heatmap

    axes = heatmap(door.diff(pair.sft, pair.aligned)).axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert set(rows) >= {"self_attn.q_proj", "mlp.up_proj", "embed_tokens", "lm_head"}
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["0", "1", "outside"]
    assert axes.images[0].get_array().shape == (len(rows), len(columns))


def test_a_plot_of_another_kind_is_refused_before_the_work(
    pair: Pair, expo: Callable[..., Ran]
) -> None:
    ran = expo("diff", pair.sft, pair.aligned, "--plot", "x.gif")
    assert ran.code == 2
    assert "a plot is written as .png or .svg" in ran.err
