"""RELEX: where a run would be at another step, from several of its checkpoints."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import expo as door
from expo.errors import SpecError
from expo.operators.methods import track_weights

from .conftest import Ran, weights, write_checkpoint

STEPS = (100, 200, 300)


def spec(steps: tuple[int, ...] = STEPS, to_step: float = 1000, **more: object) -> dict:
    models = [{"model": f"step-{s}", "parameters": {"step": s}} for s in steps]
    return {
        "merge_method": "relex",
        "base_model": "base",
        "models": models,
        "parameters": {"to_step": to_step},
        "dtype": "float32",
    } | more


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """A run: nearly straight, not evenly fast, with noise; float32."""
    monkeypatch.chdir(tmp_path)
    base, direction = weights(0, torch.float32), weights(1, torch.float32, 1e-3)
    models = {"base": base}
    for number, step in enumerate(STEPS):
        noise = weights(2 + number, torch.float32, 1e-4)
        models[f"step-{step}"] = {
            k: base[k] + (0.4 + step / 100) * direction[k] + noise[k] for k in base
        }
    for name, tensors in models.items():
        write_checkpoint(Path(name), tensors)
    return models


def merged(asked: dict, out: str, **more: object) -> dict[str, torch.Tensor]:
    door.merge(asked, out, verify=False, **more)
    return load_file(f"{out}/model.safetensors")


def test_it_is_the_line_through_the_first_singular_vector(run: dict) -> None:
    made = merged(spec(), "out")
    for name, start in run["base"].items():
        base = start.double().numpy().ravel()
        m = np.stack([run[f"step-{s}"][name].double().numpy().ravel() - base for s in STEPS])
        direction = np.linalg.svd(m, full_matrices=False)[2][0]
        slope, place = np.polyfit(STEPS, m @ direction, 1)
        expected = base + (slope * 1000 + place) * direction
        error = np.abs(made[name].double().numpy().ravel() - expected).max()
        assert error < 2e-6 * np.abs(expected).max()


def test_a_straight_run_is_continued(run: dict) -> None:
    """Checkpoints that lie on a line are met, and so is what comes after them."""
    delta = np.random.default_rng(0).normal(size=1000)
    places = np.array([1.0, 2.0, 3.0])
    m = places[:, None] * delta
    for to in (2.0, 5.0):
        found = track_weights(m @ m.T, places * 10, to * 10) @ m
        np.testing.assert_allclose(found, to * delta, rtol=1e-9)
    assert track_weights(np.zeros((3, 3)), places, 9.0).tolist() == [0, 0, 0]


def test_threads_change_no_byte_and_the_donor_may_be_the_last(
    run: dict, expo: Callable[..., Ran]
) -> None:
    Path("spec.yml").write_text(yaml.safe_dump(spec(donor="step-300")))
    for out, threads in (("one", 1), ("four", 4)):
        assert expo("merge", "spec.yml", out, "--threads", threads).code == 0
    one, four = (Path(n, "model.safetensors").read_bytes() for n in ("one", "four"))
    assert one == four


def test_what_it_needs_is_said(run: dict, expo: Callable[..., Ran]) -> None:
    for wrong, message in (
        (spec(steps=(100,)), "relex"),
        (spec() | {"parameters": {}}, "to_step"),
        (spec() | {"models": [{"model": "step-100"}, {"model": "step-200"}]}, "step"),
    ):
        Path("spec.yml").write_text(yaml.safe_dump(wrong))
        refused = expo("plan", "spec.yml")
        assert refused.code in (1, 2), refused.out
        assert message in refused.err + refused.out
    same = spec()
    for model in same["models"]:
        model["parameters"] = {"step": 5}
    with pytest.raises(SpecError, match="relex: the models are of one step"):
        merged(same, "same")
    assert not Path("same").exists()
