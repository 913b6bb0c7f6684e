"""Spectra: the laws of noise against known constants and planted signal, the verb on real files."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import expo as door
from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.reference import parse_reference
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, SpecError
from expo.operators.decompose import cut, singular_values
from expo.operators.low_rank import (
    bulk_fit,
    effective_rank,
    energy_rank,
    gavish_donoho,
    laser_rank,
    laser_rmt_threshold,
    mp_cdf,
    mp_edge,
    mp_median,
    noise_level,
    rank_above,
    shrink_frobenius,
    shrink_operator,
    snr_compat,
    snr_mp,
)
from expo.operators.rules import parse_keep
from expo.output.training import choose
from expo.planning.matrices import matrices
from expo.plots.spectra import _bulk
from expo.verbs.spectrum import MatrixSpectrum

from .conftest import write_checkpoint

SHAPES = [(400, 400), (300, 600), (150, 1200), (500, 2000)]


def noise(m: int, n: int, sigma: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sigma * torch.randn(m, n, generator=generator, dtype=torch.float64)


def planted(
    m: int, n: int, rank: int, sigma: float, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A signal of `rank` values between 1.5 and 4 edges, and the signal in noise."""
    u, _ = torch.linalg.qr(noise(m, rank, seed=seed))
    v, _ = torch.linalg.qr(noise(n, rank, seed=seed + 1))
    strengths = torch.linspace(1.5, 4.0, rank, dtype=torch.float64) * mp_edge(sigma, m, n)
    signal = (u * strengths) @ v.T
    return signal, signal + noise(m, n, sigma, seed + 2)


@pytest.mark.parametrize(
    ("beta", "root"),
    [(1, 0.8079), (0.5, 0.9113), (0.372, 0.9351), (0.286, 0.9507), (0.25, 0.9571), (0.125, 0.9789)],
)
def test_the_median_of_the_law(beta: float, root: float) -> None:
    assert math.sqrt(mp_median(beta)) == pytest.approx(root, abs=5e-5)


@pytest.mark.parametrize(
    ("beta", "known", "unknown"),
    [(1, 2.309, 2.858), (0.5, 1.979, 2.171), (0.286, 1.794, 1.887), (0.25, 1.758, 1.837)],
)
def test_the_threshold_of_gavish_and_donoho(beta: float, known: float, unknown: float) -> None:
    coefficient = gavish_donoho(1.0, round(1000 * beta), 1000) / math.sqrt(1000)
    assert coefficient == pytest.approx(known, abs=5e-4)
    assert coefficient / math.sqrt(mp_median(beta)) == pytest.approx(unknown, abs=2e-3)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_noise_is_recognized_as_noise(m: int, n: int) -> None:
    values = torch.linalg.svdvals(noise(m, n, 0.3))
    sigma = noise_level(values, m, n)
    assert sigma == pytest.approx(0.3, rel=0.02)
    assert float(values[0]) == pytest.approx(mp_edge(sigma, m, n), rel=0.02)
    assert rank_above(values, gavish_donoho(sigma, m, n)) == 0
    fit = bulk_fit(values, sigma, m, n)
    assert fit is not None
    assert fit < 0.02


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_law_against_simulation(m: int, n: int) -> None:
    eigenvalues = torch.linalg.svdvals(noise(m, n, seed=9)).square() / n
    for quantile in (0.1, 0.5, 0.9):
        point = eigenvalues.quantile(quantile).reshape(1)
        assert float(mp_cdf(point, m / n)) == pytest.approx(quantile, abs=0.02)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_planted_rank_is_found_and_laser_rmt_finds_another(m: int, n: int) -> None:
    _, observed = planted(m, n, 20, 0.02)
    values = singular_values(observed)
    sigma = noise_level(values, m, n)
    assert rank_above(values, gavish_donoho(sigma, m, n)) == 20
    assert abs(rank_above(values, mp_edge(sigma, m, n)) - 20) <= 1
    assert rank_above(values, laser_rmt_threshold(values, m, n)) > 60


@pytest.mark.parametrize(("m", "n"), [(400, 400), (200, 800)])
def test_what_each_rule_leaves_of_the_error(m: int, n: int) -> None:
    """The known order: shrinkage, then Gavish–Donoho and the edge, then laserRMT, then nothing done."""
    signal, observed = planted(m, n, 20, 0.02)
    u, values, vh = torch.linalg.svd(observed, full_matrices=False)
    sigma = noise_level(values, m, n)

    def error(kept: torch.Tensor) -> float:
        return float(((u * kept) @ vh - signal).norm() / signal.norm())

    def cut(threshold: float) -> float:
        return error(torch.where(values > threshold, values, 0.0))

    shrunk = error(shrink_frobenius(values, sigma, m, n))
    hard = cut(gavish_donoho(sigma, m, n))
    assert shrunk < hard <= cut(mp_edge(sigma, m, n)) + 1e-3
    assert hard < 0.5 * cut(laser_rmt_threshold(values, m, n))
    assert cut(laser_rmt_threshold(values, m, n)) <= error(values) + 1e-12
    operator = shrink_operator(values, sigma, m, n)
    assert float(operator[0]) > float(shrink_frobenius(values, sigma, m, n)[0])
    assert float(operator[0]) < float(values[0])
    assert float(operator[25:].abs().max()) == 0


@pytest.mark.parametrize(("m", "n"), [(64, 64), (48, 200), (200, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_against_float64(m: int, n: int, dtype: torch.dtype) -> None:
    matrix = noise(m, n).to(dtype)
    expected = torch.linalg.svdvals(matrix.double())
    assert float((singular_values(matrix) - expected).abs().max()) < 3e-5 * float(expected[0])


def test_a_weak_bulk_under_a_strong_signal_is_resolved() -> None:
    """Below 2e-4·S₀ products in float32 are blind; then they are taken in float64."""
    matrix = noise(200, 300, 1e-6) + torch.outer(noise(200, 1).view(-1), noise(300, 1).view(-1))
    expected = torch.linalg.svdvals(matrix)
    got = singular_values(matrix)
    assert float(got[100]) == pytest.approx(float(expected[100]), rel=1e-2)
    assert noise_level(got, 200, 300) == pytest.approx(1e-6, rel=0.05)


def test_ranks_and_ratios_by_hand() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    assert energy_rank(values, 0.75) == 1
    assert energy_rank(values, 0.76) == 2
    assert energy_rank(values, 1.0) == 4
    assert laser_rank(4096, 1024, 0.05) == 51
    assert snr_mp(values, 1.5) == pytest.approx(20 / 1.25)
    assert snr_mp(values, 0.1) is None
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64))
    threshold = float(quartiles[1] - quartiles[0]) / 1.349 * (1 + math.sqrt(0.5))
    assert laser_rmt_threshold(values, 2, 4) == threshold
    above = float(values[values > threshold].sum())
    assert snr_compat(values, 2, 4) == pytest.approx(above / (7.5 - above) / 4.0)
    assert effective_rank(torch.ones(7, dtype=torch.float64)) == pytest.approx(7.0)
    assert effective_rank(torch.zeros(3, dtype=torch.float64)) == 0.0
    assert snr_compat(torch.full((4,), 2.0, dtype=torch.float64), 4, 4) is None


def test_the_verb_on_the_demo_pair(expo) -> None:
    ran = expo("spectrum", MODELS / "aligned", "--minus", MODELS / "sft", "--json")
    assert ran.code == 0, ran.err
    entries = json.loads(ran.out)
    assert len(entries) == 14
    assert entries[0].keys() - {"ulp_ratio"} == {
        "tensor", "shape", "noise_sigma", "mp_edge", "rank_mp", "rank_gavish_donoho", "rank_laser_rmt",
        "snr_mp", "snr_compat", "effective_rank", "bulk_fit", "fell_back",
    }  # fmt: skip
    one = door.spectrum(MODELS / "aligned", minus=MODELS / "sft", threads=1)
    four = door.spectrum(MODELS / "aligned", minus=MODELS / "sft", threads=4)
    assert one == four
    table = expo("spectrum", MODELS / "aligned", "--target", "q_proj", "--top", 1)
    assert table.out.splitlines()[0].startswith("tensor")
    assert "… and 1 more" in table.out
    assert expo("spectrum", MODELS / "aligned", "--target", "(").code == 2
    nothing = expo("spectrum", MODELS / "aligned", "--target", "no_such")
    assert nothing.code == 1
    assert "finds no matrix of" in nothing.err


def test_the_files_for_trainers(tmp_path: Path, expo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--train-top", 50, "--train-dir", "train")
    ran = expo("spectrum", MODELS / "aligned", *flags, "--json")
    assert ran.code == 0, ran.err
    names = {one["tensor"] for one in json.loads(ran.out)}
    assert "7 of 14 tensors to train" in ran.err
    axolotl = yaml.safe_load((tmp_path / "train" / "axolotl.yml").read_text())[
        "unfrozen_parameters"
    ]
    unfrozen = {name for name in names if any(re.match(pattern, name) for pattern in axolotl)}
    assert len(unfrozen) == len(axolotl) == 7  # one of two layers for each of seven modules
    assert not any(re.match(p, n.replace(".", "x")) for p in axolotl for n in names)
    lines = (tmp_path / "train" / "trl.yml").read_text().splitlines()
    assert {line[2:] for line in lines if line.startswith("- ")} == unfrozen
    (results,) = (tmp_path / "train").glob("snr_results_*.json")
    scores = json.loads(results.read_text())
    assert scores.keys() == names
    assert all(math.isfinite(entry["snr"]) for entry in scores.values())
    for name in unfrozen:
        rivals = [n for n in names if scores[n]["type"] == scores[name]["type"]]
        assert scores[name]["snr"] == max(scores[n]["snr"] for n in rivals)
    targets = json.loads((tmp_path / "train" / "lora_targets.json").read_text())["target_modules"]
    assert {f"{module}.weight" for module in targets} == unfrozen
    again = expo("spectrum", MODELS / "aligned", *flags)
    assert again.code == 1
    assert "train exists and is not empty" in again.err


def test_the_plot(tmp_path: Path, expo) -> None:
    flags = ("--minus", MODELS / "sft", "--plot", tmp_path / "spectra.png")
    ran = expo("spectrum", MODELS / "aligned", *flags)
    assert ran.code == 0, ran.err
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert expo("spectrum", MODELS / "aligned", "--plot", tmp_path / "x.gif").code == 2


def test_the_drawn_bulk_is_the_law() -> None:
    one = MatrixSpectrum("w", (300, 900), 0.5, mp_edge(0.5, 300, 900), 0, 0, 0, 1.0, 1.0, 1.0, 0.0)
    x, density = _bulk(one)
    assert float(np.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-3)
    assert x[-1] == pytest.approx(one.mp_edge)


def test_an_undefined_score_is_the_highest_of_its_type() -> None:
    def one(layer: int, score: float | None, part: str = "") -> MatrixSpectrum:
        name = f"model.layers.{layer}.mlp.up_proj.weight{part}"
        return MatrixSpectrum(name, (2, 2), 0.0, 0.0, 0, 0, 0, score, score, 1.0, None)

    chosen = choose(
        [one(0, 3.0), one(1, None), one(2, 1.0, ":gate"), one(2, 5.0, ":up")], 34, "snr_mp"
    )
    assert chosen.trained == ("model.layers.1.mlp.up_proj.weight",)
    assert list(chosen.scores.values()) == [3.0, 5.0, 5.0]


def test_the_change_is_what_is_measured(tmp_path: Path) -> None:
    signal, observed = planted(64, 256, 3, 0.01)
    start = noise(64, 256, seed=7)
    for name, tensor in (("base", start), ("top", start + observed)):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.up_proj.weight": tensor})
    (found,) = door.spectrum(tmp_path / "top", minus=tmp_path / "base")
    assert found.rank_gavish_donoho == 3
    assert found.noise_sigma == pytest.approx(0.01, rel=0.05)
    assert found.shape == (64, 256)
    assert float(signal.norm()) > 0


def test_fused_and_stacked_tensors_are_taken_apart(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.qkv_proj.weight": noise(32, 16),
        "model.layers.0.mlp.experts.gate_up_proj": noise(3 * 12, 16).view(3, 12, 16),
        "model.layers.0.mlp.gate.weight": noise(3, 16),
        "model.layers.1.mlp.experts.gate_up_proj": noise(2 * 16, 12).view(2, 16, 12),  # gpt-oss
        "model.layers.1.attention.query_key_value.weight": noise(32, 16),  # interleaved
        "model.embed_tokens.weight": noise(10, 16),
        "model.layers.0.input_layernorm.weight": noise(16, 1).view(-1),
    }
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 6}
    folder = write_checkpoint(tmp_path / "m", tensors, config=config)
    checkpoint = open_checkpoint(parse_reference(str(folder)))
    found = {matrix.label: matrix.shape for matrix in matrices(checkpoint)}
    qkv, experts = (
        f"model.layers.0.{n}" for n in ("self_attn.qkv_proj.weight", "mlp.experts.gate_up_proj")
    )
    assert found == {
        f"{qkv}:q": (16, 16), f"{qkv}:k": (8, 16), f"{qkv}:v": (8, 16),
        **{f"{experts}[{e}]:{part}": (6, 16) for e in range(3) for part in ("gate", "up")},
        **{f"model.layers.1.mlp.experts.gate_up_proj[{e}]": (16, 12) for e in range(2)},
        "model.layers.1.attention.query_key_value.weight": (32, 16),
    }  # fmt: skip
    spectra = {one.tensor: one for one in door.spectrum(folder)}
    expected = torch.linalg.svdvals(tensors["model.layers.0.mlp.experts.gate_up_proj"][1, 6:])
    sigma = noise_level(expected, 6, 16)
    assert spectra[f"{experts}[1]:up"].noise_sigma == pytest.approx(sigma, rel=1e-4)
    assert [m.label for m in matrices(checkpoint, "embed")] == ["model.embed_tokens.weight"]


def test_zeros_have_no_noise_and_no_rank(tmp_path: Path, expo) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_checkpoint(tmp_path / "a", {name: torch.zeros(40, 60)})
    (found,) = door.spectrum(tmp_path / "a")
    assert (found.rank_mp, found.rank_gavish_donoho, found.rank_laser_rmt) == (0, 0, 0)
    assert (found.snr_mp, found.snr_compat, found.bulk_fit) == (None, None, None)
    assert found.effective_rank == 0.0
    drawn = expo("spectrum", tmp_path / "a", "--plot", tmp_path / "plot.png", "-q")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_bad_input(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_checkpoint(tmp_path / "a", {name: noise(4, 6)})
    write_checkpoint(tmp_path / "b", {name: noise(4, 8)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \[4, 8\] in b"):
        door.spectrum(tmp_path / "a", minus=tmp_path / "b")
    broken = noise(4, 6)
    broken[2, 3] = float("nan")
    write_checkpoint(tmp_path / "c", {name: broken})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds NaN or Inf"):
        door.spectrum(tmp_path / "c")
    with pytest.raises(SpecError, match="is not a regular expression"):
        door.spectrum(tmp_path / "a", target="(")


@pytest.mark.parametrize(
    ("m", "n", "errors"),
    [
        (1000, 1000, {"": 1.89, "laser_rmt": 1.46, "mp": 0.399, "gd": 0.389, "shrink=frobenius": 0.355}),
        (500, 2000, {"": 1.89, "laser_rmt": 1.89, "mp": 0.438, "gd": 0.426, "shrink=frobenius": 0.383}),
    ],
    ids=["1000×1000", "500×2000"],
)  # fmt: skip
def test_the_known_errors_of_each_rule(m: int, n: int, errors: dict[str, float]) -> None:
    """Relative errors to 20 known spikes, some below the edge, in noise 1.89 times as large."""
    spikes = torch.linspace(30.0, 190.0, 20, dtype=torch.float64)
    spikes *= math.sqrt(m * n) / 1.89 / spikes.norm()
    u, v = (torch.linalg.qr(noise(k, 20, seed=k + 1)).Q for k in (m, n))
    signal = (u * spikes) @ v.T
    observed = signal + noise(m, n)
    for rule, expected in errors.items():
        kept = cut(observed, parse_keep(rule)).matrix if rule else observed
        error = float((kept - signal).norm() / signal.norm())
        assert error == pytest.approx(expected, rel=0.04), rule
