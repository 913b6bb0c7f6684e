"""`expo info`: what a manifest holds, for a person and for a program."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import expo as door
from expo.cli.info import info_text
from expo.cli.outcome import outcome
from expo.demo.toy import MODELS
from expo.output.manifest import AdapterManifest, Manifest
from expo.results import CheckResult

from .conftest import Pair, Ran, extrapolate, weights, write_checkpoint

SFT, ALIGNED = MODELS / "sft", MODELS / "aligned"


def lines(text: str) -> dict[str, str]:
    """The lines by the words that they begin with; those without one belong to the line before."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        name = line[:10].strip() or name
        found[name] = f"{found[name]}; {line[11:]}" if name in found else line[11:]
    return found


def test_a_model(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    extrapolate(pair.sft, pair.aligned, out, alpha=1.5, rounding="stochastic", seed=3)
    ran = expo("info", out)
    assert ran.code == 0
    shown = lines(ran.out)
    assert (shown["SFT"], shown["aligned"]) == ("sft", "aligned")
    assert shown["came out"].startswith("asked alpha 1.5 (paper alpha 0.5); effective alpha 1.")
    assert shown["written"] == "BF16, stochastic rounding, seed 3"
    assert shown["verified"] == "nobody looked: expo verify does"
    assert "expo 0." in shown["made by"]
    assert shown["files"].startswith("5, each with its SHA-256")
    assert "has no tokenizer" in shown["warning"]
    assert json.loads(expo("info", out, "--json").out) == json.loads(
        (out / "expo.json").read_text()
    )


def test_a_verdict_and_its_reasons(pair: Pair, tmp_path: Path) -> None:
    known = door.info(extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5).out)
    assert isinstance(known, Manifest)
    checks = CheckResult("load", "error", "", ""), CheckResult("card", "warning", "", "")
    bad = replace(known, verified=False, verification=checks)
    assert lines(info_text(bad))["verified"] == "NO: load; warnings: card"
    good = replace(known, verified=True, verification=checks[1:])
    assert lines(info_text(good))["verified"] == "when it was made; warnings: card"


def test_an_adapter(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    out = tmp_path / "lora"
    made = door.extract_lora(ALIGNED, out, minus=SFT, rank=2, alpha=1.5)
    found = door.info(out)
    assert isinstance(found, AdapterManifest)
    assert found.modules == made.modules
    shown = lines(expo("info", out).out)
    assert shown["adapter"] == "14 modules of rank 2, for SFT, times 1.5"
    assert shown["holds"] == f"{100 * made.energy:.1f} % of the energy of the change"
    assert shown["others"] == "0 changed tensors saved whole, 7 left as in SFT"
    printed = json.loads(expo("info", out, "--json").out)
    assert printed == json.loads((out / "expo.json").read_text())
    assert json.loads(json.dumps(asdict(found))) == printed


def test_laser_and_low_rank_say_what_was_cut(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    expo("laser", ALIGNED, tmp_path / "out", "--keep", "rank=2")
    shown = lines(expo("info", tmp_path / "out").out)
    assert shown["method"] == "passthrough"
    assert shown["came out"].startswith("cut 14 of 14 matrices: rank 2 of up to 64")


def test_what_mergekit_made_is_said_to_be_so(pair: Pair, tmp_path: Path) -> None:
    result = extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5)
    known = door.info(result.out)
    assert isinstance(known, Manifest)
    text = info_text(replace(known, engine="mergekit", method="model_stock", donor=None))
    assert "the mergekit library's, which measures nothing" in text
    assert "from mergekit, as the spec asked" in text
    assert "alpha" not in text
    told = outcome(replace(result, engine="mergekit"))
    assert told == "merged by mergekit's engine, which says nothing about what came out"


def test_what_expo_has_not_made(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    model = write_checkpoint(tmp_path / "model", weights())
    ran = expo("info", model)
    assert (ran.code, ran.out) == (1, "")
    told = f"expo: {model} has no expo.json: expo did not make it; `expo verify {model}` checks any model\n"
    assert ran.err == told
    (model / "expo.json").write_text('{"schema": "expo.manifest/1"}')
    assert f"expo: {model}: expo.json is damaged: plan: " in expo("info", model).err
    (model / "expo.json").write_text("<html>")
    assert f"expo: {model}: expo.json is damaged: the file: " in expo("info", model).err
    assert expo("info", tmp_path / "nowhere").code == 2
    with pytest.raises(door.SpecError, match="is no directory"):
        door.info(model / "config.json")


def test_a_manifest_cannot_drive_the_terminal(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    out = extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5).out
    raw = json.loads((out / "expo.json").read_text())
    raw["warnings"] = ["\x1b[2J θ → α\u202e\nverified   yes"]
    (out / "expo.json").write_text(json.dumps(raw))
    assert isinstance(door.info(out), Manifest)
    shown = expo("info", out).out
    assert r"warning    \x1b[2J θ → α\u202e\nverified   yes" in shown
