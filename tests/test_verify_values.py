"""Verify: what the tensors hold, against the aligned model's; and the files around them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.compute.summary import statistics
from expo.operators.statistics import Sums
from expo.output.manifest import Manifest, SourceEntry
from expo.verification import tensors
from expo.verification.check import CheckResult
from expo.verification.run import judge
from expo.verification.subject import Subject, TensorFacts

from .conftest import Tensors, nudged, weights, write_checkpoint
from .openchat import write_model


def read(out: Path, aligned: Path | None) -> Subject:
    donor = open_checkpoint(parse_reference(str(aligned), role="ALIGNED")) if aligned else None
    subject = Subject(open_directory(out), donor)
    subject.tensor_facts = tensors.read_tensors(subject)
    return subject


def checks(out: Path, aligned: Path | None) -> dict[str, CheckResult]:
    return {check.name: check for check in judge(read(out, aligned)).checks}


def write_pair(folder: Path, change: dict[str, torch.dtype] | None = None) -> tuple[Path, Path]:
    mine, theirs = nudged(weights()), weights()
    theirs |= {name: theirs[name].to(dtype) for name, dtype in (change or {}).items()}
    return write_checkpoint(folder / "out", mine, shards=2), write_checkpoint(
        folder / "aligned", theirs
    )


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 24])
def test_sums_are_those_of_the_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(tensors, "_CHUNK_BYTES", chunk_bytes)
    name = "model.layers.0.self_attn.q_proj.weight"
    out, aligned = write_pair(tmp_path, {name: torch.float32})
    held: Tensors = {k: t for file in out.glob("*.safetensors") for k, t in load_file(file).items()}
    theirs = load_file(aligned / "model.safetensors")
    found = read(out, aligned).scanned.values
    assert found.keys() == held.keys()
    for key, tensor in held.items():
        w, a = tensor.double(), theirs[key].double()
        sums = found[key].sums
        assert sums is not None
        assert sums.cosine == pytest.approx(float((w * a).sum() / w.norm() / a.norm()), rel=1e-4)
        assert sums.ratio == pytest.approx(float(w.norm() / a.norm()), rel=1e-4)
        assert sums.distance == pytest.approx(float((w - a).norm() / a.norm()), rel=1e-3)
        assert found[key].largest == float(w.abs().max())


@pytest.mark.parametrize("chunk_bytes", [30, 64, 1 << 24])
def test_zero_rows_are_found_wherever_a_chunk_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(tensors, "_CHUNK_BYTES", chunk_bytes)
    held = weights()
    held["lm_head.weight"][[0, 5, 6, 11]] = 0
    held["lm_head.weight"][4, :9] = 0
    found = read(write_checkpoint(tmp_path / "out", held), None).scanned.values
    assert found["lm_head.weight"].zero_rows == (0, 5, 6, 11)
    assert found["model.embed_tokens.weight"].zero_rows == ()


def test_what_was_not_compared_is_said(tmp_path: Path) -> None:
    out, aligned = write_pair(tmp_path)
    held = load_file(aligned / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(held | {name: held[name].T.contiguous()}, aligned / "model.safetensors")
    found = checks(out, aligned)["coverage"]
    assert found.status == "info"
    assert f"not checked against the aligned model: {name} (1 in all)" in found.message


def test_a_merge_without_effect(tmp_path: Path) -> None:
    _, aligned = write_pair(tmp_path)
    shutil.copytree(aligned, tmp_path / "copy")
    assert checks(tmp_path / "copy", aligned)["effect"].status == "info"
    moved = replace(statistics(Sums(10, 1.0, 1.0)), unmoved_share=0.4)
    manifest = Manifest(
        plan="", method="expo", sources={"sft": SourceEntry("sft", None, None, None)}, inputs={}, seed=0, statistics=moved, notes=(), warnings=(), files={}
    )  # fmt: skip
    (tmp_path / "copy" / "expo.json").write_text(manifest.to_json())
    found = checks(tmp_path / "copy", aligned)["effect"]
    assert found.status == "error"
    assert "alpha had no effect" in found.message


def test_another_model_altogether(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", weights(seed=1))
    write_checkpoint(tmp_path / "aligned", weights(seed=2))
    found = checks(tmp_path / "out", tmp_path / "aligned")["direction"]
    assert found.status == "error"
    assert "another model" in found.message


def test_a_stream_reads_no_values(tmp_path: Path) -> None:
    out, aligned = write_pair(tmp_path)
    donor = open_checkpoint(parse_reference(str(aligned), role="ALIGNED"))
    subject = Subject(open_directory(out), donor, tensor_facts=TensorFacts({}))
    found = {check.name: check.status for check in judge(subject).checks}
    assert {found[name] for name in ("direction", "norms", "effect", "largest", "zero-rows")} == {
        "skipped"
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "aligned")


def test_files_beside_are_compared(tmp_path: Path, model: Path) -> None:
    out, aligned = tmp_path / "out", tmp_path / "aligned"
    shutil.copytree(model, aligned)
    (aligned / "preprocessor_config.json").write_text("{}")
    shutil.copytree(aligned, out)
    assert checks(out, aligned)["processor-files"].status == "pass"
    (out / "preprocessor_config.json").write_text('{"size": 1}')
    assert "preprocessor_config.json is not" in checks(out, aligned)["processor-files"].message
    (out / "preprocessor_config.json").unlink()
    assert checks(out, aligned)["processor-files"].status == "error"


def test_files_that_hurt_nobody(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "out")
    (tmp_path / "out" / "labels.json").write_text('["a", "b"]')
    (tmp_path / "out" / "number.json").write_text("1.5")
    (tmp_path / "out" / "training_args.bin").write_bytes(b"x")
    (tmp_path / "out" / "consolidated.00.pth").write_bytes(b"x")
    found = checks(tmp_path / "out", None)
    assert found["json"].status == "pass"
    assert found["orphans"].status == "info"
    assert "left by training" in found["orphans"].message
