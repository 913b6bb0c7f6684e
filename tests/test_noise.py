"""The noise of quantized pairs: estimated from their codes, against pairs whose true change is known; and the gate."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import expo as door
from expo.operators.codes import e2m1, e4m3
from expo.operators.noise import crossings, grid
from expo.planning.build import build_plan
from expo.planning.noise import REFUSED, WARNED
from expo.results import CodingNoise
from expo.spec.request import make_request

from .conftest import Ran, Tensors, write_checkpoint
from .quantized import FP8, mxfp4, numbers, unpacked, write_quantized

Expo = Callable[..., Ran]

FIELD = {6.3e-6: (13.5, 28.6), 2e-4: (2.2, 5.0), 1e-3: (0.7, 2.0)}
"""RMS of the change → noise over change in E4M3 with blocks of 128 × 128, and in MXFP4."""

SIZE = 512
NAMES = [f"model.layers.{n}.mlp.down_proj" for n in range(3)]
CONFIG = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 12}


def coded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 in blocks of 128 × 128."""
    parts = weight.float().view(SIZE // 128, 128, SIZE // 128, 128)
    scale = parts.abs().amax((1, 3), keepdim=True) / 448
    return (parts / scale).to(torch.float8_e4m3fn).view(SIZE, SIZE), scale[:, 0, :, 0].contiguous()


@dataclass(frozen=True)
class Pairs:
    """θ of standard deviation .02 and θ + Δ with Δ of a known size: plain, in FP8, in MXFP4."""

    root: Path
    delta: Tensors
    numbers: dict[str, Tensors]

    def path(self, side: str, form: str) -> Path:
        return self.root / f"{side}-{form}"

    def true_ratio(self, sft: str, aligned: str) -> float:
        """Noise over change of what is stored."""
        stored = [self.numbers[f"aligned-{aligned}"][n] - self.numbers[f"sft-{sft}"][n] for n in NAMES]  # fmt: skip
        delta = torch.stack([*self.delta.values()])
        return float((torch.stack(stored).double() - delta).norm() / delta.norm())


def make_pairs(root: Path, rms: float) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, SIZE, SIZE, generator=generator, dtype=torch.float64)  # noqa: E731
    sft = {name: draw() * 0.02 for name in NAMES}
    delta = {name: draw() * rms for name in NAMES}
    sides = {"sft": sft, "aligned": {name: sft[name] + delta[name] for name in NAMES}}
    known: dict[str, Tensors] = {}
    for side, tensors in sides.items():
        fp8s = {name: coded(t[0]) for name, t in tensors.items()}
        fours = {name: mxfp4(t.transpose(1, 2).contiguous()) for name, t in tensors.items()}
        stored = {name: codes[None] for name, (codes, _) in fp8s.items()}
        stored |= {f"{name}_scale_inv": scales[None] for name, (_, scales) in fp8s.items()}
        section = FP8 | {"weight_block_size": [128, 128]}
        write_quantized(root / f"{side}-fp8", stored, section, config=CONFIG)
        stored = {f"{name}_blocks": blocks for name, (blocks, _) in fours.items()}
        stored |= {f"{name}_scales": scales for name, (_, scales) in fours.items()}
        write_quantized(root / f"{side}-mxfp4", stored, {"quant_method": "mxfp4"}, config=CONFIG)
        plain = {name: t.float() for name, t in tensors.items()}
        write_checkpoint(root / f"{side}-plain", plain, config=CONFIG)
        known |= {
            f"{side}-fp8": {n: numbers(*c, (128, 128))[None] for n, c in fp8s.items()},
            f"{side}-mxfp4": {n: unpacked(*c) for n, c in fours.items()},
            f"{side}-plain": plain,
        }
    return Pairs(root, delta, known)


@pytest.fixture(scope="module", params=FIELD, ids=str)
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return make_pairs(tmp_path_factory.mktemp("pairs"), request.param)


def noise(pairs: Pairs, sft: str, aligned: str) -> CodingNoise:
    places = pairs.path("sft", sft), pairs.path("aligned", aligned)
    found = build_plan(make_request(*map(str, places))).noise
    assert found is not None
    return found


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_a_pair_on_one_grid(form: str, pairs: Pairs, request: pytest.FixtureRequest) -> None:
    rms = request.node.callspec.params["pairs"]
    found, true = noise(pairs, form, form), pairs.true_ratio(form, form)
    assert found.ratio == pytest.approx(true, rel=0.15)
    assert found.ratio == pytest.approx(FIELD[rms][form == "mxfp4"], rel=0.15)
    assert found.delta_rms == pytest.approx(rms, rel=0.15)
    assert found.tensors == len(NAMES)


@pytest.mark.parametrize(
    ("sft", "aligned"), [("plain", "fp8"), ("fp8", "plain"), ("plain", "mxfp4"), ("mxfp4", "fp8")]
)
def test_errors_that_do_not_cancel(sft: str, aligned: str, pairs: Pairs) -> None:
    """Of codes on one side, or of two kinds: told where they leave something to tell, refused where they don't."""
    found, true = noise(pairs, sft, aligned), pairs.true_ratio(sft, aligned)
    if true < WARNED:
        assert found.ratio == pytest.approx(true, rel=0.15)
    elif true > 2 * REFUSED:
        assert found.ratio > REFUSED


def test_a_model_that_was_trained_from_the_numbers_has_no_such_noise(
    pairs: Pairs, request: pytest.FixtureRequest
) -> None:
    """The usual fate of models that are published in FP8 or MXFP4 alone."""
    for form in ("fp8", "mxfp4"):
        start = pairs.numbers[f"sft-{form}"]
        trained = {name: (t + pairs.delta[name]).bfloat16() for name, t in start.items()}
        place = write_checkpoint(pairs.root / f"from-{form}", trained, config=CONFIG)
        plan = build_plan(make_request(str(pairs.path("sft", form)), str(place), alpha=1.5))
        assert plan.noise is not None
        assert plan.noise.ratio < (1 if request.node.callspec.params["pairs"] == 1e-3 else 1e-9)
        assert not plan.refusals


def test_the_mean_over_gaussian_changes() -> None:
    draws = np.random.default_rng(0).standard_normal(400_000)
    for s in (0.01, 0.2, 0.25, 0.3, 0.6, 3.0):
        part = np.abs(draws * s) % 1
        assert crossings(np.array([s]))[0] == pytest.approx(np.mean(part * (1 - part)), rel=0.01)
    assert crossings(np.array([math.inf]))[0] == 1 / 6


@pytest.mark.parametrize(("table", "codes"), [(e4m3(), (64, 100, 126)), (e2m1(), (1, 4, 6, 7))])
def test_grids_are_the_errors_of_rounding(table: np.ndarray, codes: tuple[int, ...]) -> None:
    """Of evenly spread numbers, code by code."""
    points = np.unique(table[np.isfinite(table)].astype(np.float64))
    spread = np.linspace(points[0], points[-1], 2_000_001)
    nearest = np.searchsorted((points[1:] + points[:-1]) / 2, spread)
    error = (points[nearest] - spread) ** 2
    for code in codes:
        mine = nearest == np.searchsorted(points, table[code])
        assert grid(table).square[code] / 12 == pytest.approx(error[mine].mean(), rel=0.02)


# The gate.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A change of the size of a DPO run."""
    return make_pairs(tmp_path_factory.mktemp("small"), 6.3e-6)


def test_mostly_noise_is_not_extrapolated(small: Pairs, tmp_path: Path, expo: Expo) -> None:
    pair = small.path("sft", "fp8"), small.path("aligned", "fp8")
    ran = expo("extrapolate", *pair, tmp_path / "out", "--alpha", 1.5, "-q")
    assert ran.code == 1
    assert ran.err == (
        "expo: the codes of the quantized inputs leave noise of about 14 times the change, and extrapolating multiplies "
        "it too: more than 5 times is refused; name the unquantized originals, or go on with --force (force: true)\n"
    )
    assert not (tmp_path / "out").exists()
    ran = expo("plan", *pair, "--alpha", 1.5, "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["noise"]["ratio"] == pytest.approx(13.5, rel=0.15)
    for flags in (["--alpha", 1], ["--alpha", 0.5, "--interpolate"], ["--alpha", 1.5, "--force"], []):  # fmt: skip
        ran = expo("plan", *pair, *flags)
        assert ran.code == 0
        assert "note       the codes of quantized inputs leave noise of about 14 times the change, by a sample of 3 tensors" in ran.out  # fmt: skip
        assert "warning    what SFT and aligned differ by is mostly noise of their codes" in ran.out
    ran = expo("plan", *pair, "--alphas", "0.5,1,1.2,1.5", "--interpolate")
    assert ran.code == 1
    assert ran.out.count("refused ") == 1
    assert expo("diff", *pair, "--json").code == 0


def test_an_adapter_of_mostly_noise(small: Pairs, tmp_path: Path, expo: Expo) -> None:
    sft, aligned = small.path("sft", "fp8"), small.path("aligned", "fp8")
    asked = ("extract-lora", aligned, tmp_path / "out", "--minus", sft, "--rank", 2, "--alpha")
    ran = expo(*asked, 1.5, "-q")
    assert ran.code == 1
    assert "more than 5 times is refused" in ran.err
    assert not (tmp_path / "out").exists()
    assert "stack of experts" in expo(*asked, 1.5, "--force", "-q").err  # so far it gets
    assert "stack of experts" in expo(*asked, 1, "-q").err
    ran = expo("spectrum", aligned, "--minus", sft)
    assert ran.err.count("is dequantized as it is read: ") == 2


def test_a_run_that_is_forced_says_so(small: Pairs, tmp_path: Path) -> None:
    spec = {"merge_method": "expo", "base_model": str(small.path("sft", "fp8")),
            "models": [{"model": str(small.path("aligned", "fp8")), "parameters": {"alpha": 1.5}}]}  # fmt: skip
    with pytest.raises(door.CheckpointError, match="--force"):
        door.merge(spec, tmp_path / "out", verify=False)
    result = door.merge(spec | {"force": True}, tmp_path / "out", verify=False)
    manifest = door.info(tmp_path / "out")
    assert manifest.noise.ratio > 10  # type: ignore[union-attr]
    assert manifest.spec["force"] is True  # type: ignore[union-attr]
    assert "about 14 times the change" in result.warnings[0]
    assert door.plan(spec).refusals
    assert not door.plan(spec, force=True).refusals
    paths = small.path("sft", "fp8"), small.path("aligned", "fp8")
    assert door.extrapolate(*paths, tmp_path / "b", alpha=1.5, force=True, verify=False).out


def test_the_worst_of_several_models_counts(small: Pairs) -> None:
    models = [small.path("aligned", form) for form in ("plain", "fp8")]
    spec = {"merge_method": "expo", "base_model": str(small.path("sft", "fp8")),
            "models": [{"model": str(m), "parameters": {"alpha": 0.75}} for m in models]}  # fmt: skip
    for base, ratio in (("fp8", 13), ("plain", 15)):
        spec["base_model"] = str(small.path("sft", base))
        report = door.plan(spec | {"interpolate": True})
        assert report.noise is not None
        assert report.noise.ratio > ratio
        assert report.ok


def test_other_methods_have_no_gate(small: Pairs) -> None:
    spec = {"merge_method": "task_arithmetic", "base_model": str(small.path("sft", "fp8")),
            "models": [{"model": str(small.path("aligned", "fp8")), "parameters": {"weight": 1.5}}]}  # fmt: skip
    report = door.plan(spec)
    assert report.ok
    assert report.noise is None


def test_what_cannot_be_measured_is_not_refused(small: Pairs, tmp_path: Path) -> None:
    """The same model twice; files of holes, whose scales are 0."""
    place = str(small.path("sft", "fp8"))
    assert build_plan(make_request(place, place, alpha=1.5)).noise is None
    holes = {f"{NAMES[0]}": torch.zeros(4, 4).to(torch.float8_e4m3fn), f"{NAMES[0]}_scale": torch.zeros(1)}  # fmt: skip
    for name in ("a", "b"):
        write_quantized(tmp_path / name, holes | {"x": torch.full((2,), float(name == "a"))}, None)
    plan = build_plan(make_request(str(tmp_path / "a"), str(tmp_path / "b"), alpha=1.5))
    assert plan.noise is None
    assert not plan.refusals


def test_a_plan_at_another_alpha_is_judged_by_it(small: Pairs) -> None:
    paths = str(small.path("sft", "fp8")), str(small.path("aligned", "fp8"))
    plan = build_plan(make_request(*paths, alpha=1.0))
    assert not plan.refusals
    assert len(plan.at(1.5).refusals) == 1
    assert plan.at(1.5).at(0.0).refusals == ()
    forced = replace(plan, request=plan.request.forced())
    assert forced.at(2.0).refusals == ()
