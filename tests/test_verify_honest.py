"""Verify: what was not looked at is no pass, cures fit the folder, and one fault has one verdict."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.compute.summary import statistics
from expo.operators.statistics import Sums
from expo.output.manifest import Manifest, SourceEntry
from expo.results import CheckResult
from expo.verification.process import Report
from expo.verification.run import judge
from expo.verification.subject import Reports, Subject
from expo.verification.tensors import read_tensors

from .conftest import weights, write_checkpoint

MANIFEST = Manifest(
    plan="", method="expo", sources={"sft": SourceEntry("sft", None, None, None)}, inputs={}, seed=0, statistics=statistics(Sums()), notes=(), warnings=(), files={}
)  # fmt: skip

NOTHING = Reports()


def checks(
    out: Path, reports: Reports = NOTHING, *, aligned: Path | None = None, reads: bool = False
) -> dict[str, CheckResult]:
    donor = open_checkpoint(parse_reference(str(aligned), role="ALIGNED")) if aligned else None
    subject = Subject(open_directory(out), donor, reports=reports)
    subject.tensor_facts = read_tensors(subject) if reads else None
    return {check.name: check for check in judge(subject).checks}


def test_an_empty_folder_passes_only_what_was_looked_at(tmp_path: Path) -> None:
    found = checks(tmp_path, reads=True)
    passed = {name for name, check in found.items() if check.status == "pass"}
    assert passed == {"stale-weights", "orphans", "modes", "remote-code"}


def test_a_shard_that_cannot_be_read_leaves_the_values_unchecked(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", weights(), shards=2)
    for file in out.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    found = checks(out, reads=True)
    assert found["shards"].status == "error"
    names = ("readable", "finite", "all-zero", "largest", "zero-rows")
    assert {found[name].status for name in names} == {"skipped"}


def test_only_a_merge_of_expo_can_be_run_again(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", weights(), shards=2)
    next(out.glob("*.safetensors")).write_bytes(b"")
    assert checks(out)["shards"].cure == "copy or download the file again"
    (out / "expo.json").write_text(MANIFEST.to_json())
    assert checks(out)["shards"].cure == "run the merge again"


def test_a_folder_that_its_merge_did_not_verify_says_so(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", weights())
    then = CheckResult("vectors", "error", "openchat, question: position 1", "use others")
    failed = replace(MANIFEST, verified=False, verification=(then,))
    (out / "expo.json").write_text(failed.to_json())
    found = checks(out)["at-merge"]
    assert found.status == "warning"
    assert found.message == "the merge did not verify: vectors: openchat, question: position 1"
    (out / "expo.json").write_text(MANIFEST.to_json())
    assert checks(out)["at-merge"].status == "info"
    (out / "expo.json").write_text(replace(MANIFEST, verified=True).to_json())
    assert checks(out)["at-merge"].status == "pass"


def test_what_the_merge_saw_in_the_aligned_model_is_remembered(tmp_path: Path) -> None:
    """`expo verify OUT` comes to the merge's verdict, with the aligned model at hand or without."""
    aligned = write_checkpoint(tmp_path / "aligned", weights())
    (aligned / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    shutil.copytree(aligned, tmp_path / "out")
    merged = checks(tmp_path / "out", aligned=aligned)["config"]
    assert merged.status == "info"
    assert checks(tmp_path / "out")["config"].status == "error"
    manifest = replace(MANIFEST, verified=True, verification=(merged,))
    (tmp_path / "out" / "expo.json").write_text(manifest.to_json())
    alone = checks(tmp_path / "out")["config"]
    assert alone == merged
    (tmp_path / "out" / "config.json").write_text("{}")
    assert checks(tmp_path / "out")["config"].status == "error"


def _said(**answers: tuple[int, ...]) -> Report:
    """A child that generated these ids: `mine` and `theirs` by prompt."""
    lines = [
        {"generated": number, "of": whose, "ids": list(ids), "text": "x" * len(ids)}
        for whose, all_ids in (("out", answers["mine"]), ("aligned", answers["theirs"]))
        for number, ids in enumerate([all_ids])
    ]
    return Report(tuple(lines), None)


@pytest.mark.parametrize(
    ("mine", "theirs", "status"),
    [
        ((5,) * 256, (6, 7) * 128, "info"),
        (tuple(range(256)), (5,) * 60, "info"),
        ((5,) * 256, (3, 4), "error"),
        ((3, 4), (5,) * 256, "pass"),
    ],
)
def test_generation_is_judged_beside_the_aligned_models(
    tmp_path: Path, mine: tuple[int, ...], theirs: tuple[int, ...], status: str
) -> None:
    aligned = write_checkpoint(tmp_path / "aligned", weights())
    out = write_checkpoint(tmp_path / "out", weights())
    reports = Reports(generation=_said(mine=mine, theirs=theirs))
    found = checks(out, reports, aligned=aligned)["generation"]
    assert found.status == status
    assert "alpha" not in found.cure
    (out / "expo.json").write_text(MANIFEST.to_json())
    found = checks(out, reports, aligned=aligned)["generation"]
    assert ("try a smaller alpha" in found.cure) == (status == "error")
