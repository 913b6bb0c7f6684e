"""The demo: a curve that rises beyond the aligned model and falls."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from expo.demo.toy import MODELS, reward

from .conftest import Ran


@pytest.mark.filterwarnings("ignore")
def test_the_reward_rises_and_falls(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    out = tmp_path / "demo"
    ran = expo("demo", "--out", out, "--json", "-q")
    assert ran.code == 0, ran.err
    points = {p["alpha"]: p["reward"] for p in json.loads(ran.out)["points"]}
    best = max(points.values())
    assert points[0.0] < points[1.0] < best
    assert best == max(points[a] for a in points if 2 <= a <= 4)
    assert points[8.0] < points[0.0]
    assert (out / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert points[1.0] == pytest.approx(reward(MODELS / "aligned"), abs=1e-6)
    again = expo("demo", "--out", out)  # a second run replaces the first
    assert again.code == 0
    assert "expo extrapolate SFT ALIGNED OUT --alpha 1.5" in again.out
    assert "best" in again.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_training_script_makes_such_a_pair(tmp_path: Path) -> None:
    import expo as door
    from expo.demo.train import main

    main(tmp_path)
    rewards = {}
    for alpha in (0.0, 1.0, 2.0, 3.0, 4.0, 14.0):
        out = tmp_path / f"out{alpha}"
        door.extrapolate(tmp_path / "sft", tmp_path / "aligned", out, alpha=alpha, verify=False)
        rewards[alpha] = reward(out)
    assert rewards[0.0] < rewards[1.0] < max(rewards[a] for a in (2.0, 3.0, 4.0))
    assert rewards[14.0] < rewards[0.0]
