"""Verify: a merge of quantized models is held against their numbers; a folder of codes is told as one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import expo as door
from expo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.results import CheckResult
from expo.verification.run import judge, shapes_of
from expo.verification.subject import Subject
from expo.verification.tensors import read_tensors

from .conftest import Tensors, nudged, weights, write_checkpoint
from .quantized import FP8, mxfp4, plain, quantized, write_quantized

BLOCK = (16, 8)
SECTION = FP8 | {"weight_block_size": [*BLOCK]}
OF_VALUES = ("finite", "all-zero", "largest", "direction", "norms", "effect", "coverage")
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def found(folder: Path, aligned: Path | None = None) -> dict[str, CheckResult]:
    """Every check that needs no child process."""
    donor = None if aligned is None else opened(aligned)
    subject = Subject(open_directory(folder), donor)
    subject.tensor_facts = read_tensors(subject)
    return {check.name: check for check in judge(subject).checks}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(parse_reference(str(folder), role="ALIGNED"))


def pair(root: Path) -> tuple[Path, Path]:
    """FP8 projections, and experts in MXFP4."""
    experts = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1)) * 0.02
    folders = []
    for name, tensors in {"sft": weights(), "aligned": nudged(weights(), scale=2e-3)}.items():
        blocks, scales = mxfp4(experts if name == "sft" else experts * 1.1)
        coded = quantized(tensors, BLOCK) | {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}  # fmt: skip
        folders.append(write_quantized(root / name, coded, SECTION, shards=3))
    return folders[0], folders[1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    door.extrapolate(*pair(tmp_path), tmp_path / "out", alpha=1.5, verify=False)
    return tmp_path / "out"


def test_an_output_agrees_with_its_donor(out: Path) -> None:
    checks = found(out, out.parent / "aligned")
    held = ("index", "total-size", "manifest", "codes", "keys", "shapes", "dtypes", "architecture", *OF_VALUES)  # fmt: skip
    assert {name: checks[name].message for name in held if checks[name].status != "pass"} == {}


def changed(out: Path, change: Callable[[Tensors], object]) -> None:
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def test_values_are_held_against_the_numbers(out: Path) -> None:
    """One projection is another's, the experts lie as their codes do."""
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors: Tensors) -> None:
        if name in tensors:
            tensors[name] = plain(quantized(nudged(weights(), scale=2e-3), BLOCK), BLOCK)[name.replace(".0.", ".1.")].bfloat16()  # fmt: skip
        if EXPERTS in tensors:
            tensors[EXPERTS] = tensors[EXPERTS].transpose(1, 2).contiguous().view(2, 64, 6)

    changed(out, change)
    said = found(out, out.parent / "aligned")["direction"]
    assert said.status == "error"
    assert f"{name} is the aligned model's {name.replace('.0.', '.1.')}" in said.message
    assert f"{EXPERTS} is unlike the aligned model's" in said.message


def test_a_tensor_of_zeros_is_a_fault_but_where_the_codes_are(tmp_path: Path) -> None:
    stored = {"a.weight": torch.zeros(4, 4), "b.weight": torch.ones(4, 4)}
    coded = {n: t.to(torch.float8_e4m3fn) for n, t in stored.items()}
    coded["a.weight"][0] = -0.0
    aligned = write_quantized(tmp_path / "aligned", coded | {f"{n}_scale": torch.ones(1) for n in stored}, None)  # fmt: skip
    same = write_checkpoint(tmp_path / "same", {n: t.bfloat16() for n, t in stored.items()})
    assert "a.weight is all zero (as in the aligned model)" in found(same, aligned)["all-zero"].message  # fmt: skip
    lost = write_checkpoint(tmp_path / "lost", {n: torch.zeros(4, 4).bfloat16() for n in stored})
    assert found(lost, aligned)["all-zero"].status == "error"


def test_codes_left_in_the_configuration_are_a_fault(out: Path) -> None:
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": SECTION}))
    said = found(out, out.parent / "aligned")["architecture"]
    assert said.status == "error"
    assert "quantization_config is" in said.message


def test_a_folder_of_codes_is_not_passed(tmp_path: Path) -> None:
    """Alone, and against a model that is quantized too."""
    _, aligned = pair(tmp_path)
    for checks in (found(aligned), found(aligned, aligned)):
        assert checks["codes"].status == "warning"
        assert "model.layers.0.mlp.up_proj.weight and 9 more: codes or scales of a quantized model, and what they stand for was not looked at" in checks["codes"].message  # fmt: skip
        assert "merge_method: passthrough" in checks["codes"].cure
        for name in OF_VALUES:
            assert checks[name].status == "skipped"
    for name in ("keys", "shapes", "dtypes", "load"):
        assert found(aligned, aligned)[name].message == "its weights are codes of a quantized model"
    assert shapes_of(Subject(open_directory(aligned))) is None
