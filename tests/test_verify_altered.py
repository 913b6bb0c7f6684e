"""Verify: of a changed file not only that its hash differs, but what was done to it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import expo
from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.verification.check import CheckResult
from expo.verification.run import judge
from expo.verification.subject import Subject
from expo.verification.tensors import read_tensors

from .conftest import Tensors, nudged, weights, write_checkpoint

GATE, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("altered")
    held = weights() | {NORM: torch.ones(10, dtype=torch.bfloat16)}
    write_checkpoint(root / "sft", held)
    write_checkpoint(root / "aligned", nudged(held))
    expo.extrapolate(root / "sft", root / "aligned", root / "out", alpha=1.5, verify=False)
    return root


def checks(out: Path, aligned: Path | None = None) -> dict[str, CheckResult]:
    donor = open_checkpoint(parse_reference(str(aligned), role="ALIGNED")) if aligned else None
    subject = Subject(open_directory(out), donor)
    subject.tensor_facts = read_tensors(subject)
    return {check.name: check for check in judge(subject).checks}


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    def inject(out: Path) -> None:
        held = load_file(out / WEIGHTS)
        change(held)
        save_file(held, out / WEIGHTS, {"format": "pt"})

    return inject


def text(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda out: (out / name).write_text(change((out / name).read_text()), newline="")


ALONE = {
    "truncated": (lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-8]), "model.safetensors is truncated"),
    "saved in another dtype": (tensors(lambda t: t.update({n: v.float() for n, v in t.items()})), "was saved again: it holds F32, the merge wrote BF16"),
    "a norm × 100": (tensors(lambda t: t[NORM].mul_(100)), f"was changed: {NORM} has a norm of"),
    "a matrix halved": (tensors(lambda t: t[GATE].div_(2)), f"was changed: {GATE} has a norm of"),
    "NaN": (tensors(lambda t: t[GATE].view(-1)[3].fill_(float("nan"))), f"was changed: {GATE} holds NaN"),
    "one bit": (lambda out: (out / WEIGHTS).write_bytes((raw := (out / WEIGHTS).read_bytes())[:-1] + bytes([raw[-1] ^ 1])), "single values or the header"),
    "line ends": (text("config.json", lambda t: t + "\n"), "config.json is not the file that was written: a line end was added"),
    "no JSON": (text("config.json", lambda t: t[:-3]), "config.json was edited, and is not JSON any more"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_a_changed_file_is_named_with_its_cause(merged: Path, tmp_path: Path, name: str) -> None:
    inject, says = ALONE[name]
    shutil.copytree(merged / "out", tmp_path / "out")
    assert checks(tmp_path / "out")["manifest"].status == "pass"
    inject(tmp_path / "out")
    found = checks(tmp_path / "out")
    assert says in found["manifest"].message
    assert found["norms"].status in ("skipped" if name == "truncated" else "pass", "error")


def test_against_the_aligned_model_more_is_seen(merged: Path, tmp_path: Path) -> None:
    out, aligned = tmp_path / "out", merged / "aligned"
    shutil.copytree(merged / "out", out)
    tensors(lambda t: t[GATE].copy_(t[GATE].flip(0)))(out)
    assert "single values" in checks(out)["manifest"].message
    assert (
        f"{GATE} has a distance to the aligned model of" in checks(out, aligned)["manifest"].message
    )
    text("config.json", lambda t: t.replace("mistral", "llama"))(out)
    said = checks(out, aligned)["manifest"].message
    assert "config.json was edited: model_type is llama, mistral in the aligned model" in said


def test_a_norm_is_found_alone(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged / "out", tmp_path / "out")
    tensors(lambda t: t[NORM].mul_(100))(tmp_path / "out")
    found = checks(tmp_path / "out")["norms"]
    assert found.status == "error"
    assert "by expo.json" in found.message


def test_a_norm_is_seen_among_its_layers_without_a_manifest(tmp_path: Path) -> None:
    norm = "model.layers.{}.input_layernorm.weight"
    held = {norm.format(n): torch.ones(10) for n in range(5)}
    held[norm.format(2)] *= 100
    found = checks(write_checkpoint(tmp_path / "out", held))["norms"]
    assert found.status == "info"
    assert "layers.2.input_layernorm.weight has a norm of 316, 3.16 and 3.16" in found.message
    assert json.loads((tmp_path / "out" / "config.json").read_text())
