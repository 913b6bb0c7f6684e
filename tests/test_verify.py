"""Verify: a clean folder has no finding, and every injected fault is named by its check."""

import json
import re
import shutil
from pathlib import Path

import pytest

import expo as door
from expo.verification.run import CHECKS, judge
from expo.verification.tensors import read_tensors

from .clean import VECTORS, Clean
from .faults import CARD_BLIND, FAULTS, FIRST
from .openchat import TEMPLATE, write_model


def test_a_clean_folder_has_no_finding(clean: Clean) -> None:
    result = door.verify(
        clean.out, against=clean.aligned.files.root, vectors=VECTORS / "openchat.yml"
    )
    found = {check.name: check.status for check in result.checks}
    assert result.ok
    assert {name for name, status in found.items() if status in ("error", "warning")} == set()
    skipped = {name for name, status in found.items() if status == "skipped"}
    assert skipped == {"template-sft", "generation", "drift"}


def test_the_table_has_every_check_once() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert {fault.check for fault in FAULTS.values()} >= {
        check.name
        for check in CHECKS
        if check.severity != "info"
        and check.name not in ("vectors", "generation", "readable", "processor-files", "effect")
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if f.reads else n for n, f in FAULTS.items()]
)
def test_a_fault_is_named_by_its_check(clean: Clean, folder: Path, name: str) -> None:
    fault = FAULTS[name]
    before = clean.checks(folder, "")[fault.check].status
    fault.inject(folder)
    subject = clean.subject(folder, fault.reads)
    after = {check.name: check for check in judge(subject).checks}[fault.check]
    assert before not in ("error", "warning"), before
    assert after.status == fault.status, after
    assert fault.says in after.message, after
    assert after.cure or after.status == "info"
    if name in CARD_BLIND:  # the three published vectors are necessary, not sufficient
        for case in clean.golden.cases[:3]:
            assert case.text is not None
            assert case.name.startswith("card")
            assert subject.tokenizer.texts[case.text]["ids"] == case.ids


@pytest.mark.slow
def test_generation_and_drift(clean: Clean, folder: Path) -> None:
    """A random model does not end its answers; the demo's trained one does."""
    from expo.demo.toy import MODELS

    trained = door.verify(MODELS / "aligned", against=MODELS / "sft", generate=True)
    found = {check.name: check for check in trained.checks}
    assert found["generation"].status == "pass", found["generation"]
    assert found["drift"].status == "info"
    assert "nats a token" in found["drift"].message
    same = door.verify(MODELS / "sft", against=MODELS / "sft", generate=True, quick=True)
    assert "is 0 nats" in {check.name: check for check in same.checks}["drift"].message
    random = door.verify(folder, generate=True, quick=True)
    assert not random.ok
    (found,) = [check for check in random.checks if check.name == "generation"]
    assert found.status == "error"
    assert "does not end" in found.message or "over and over" in found.message


def test_a_template_diff_shows_where(clean: Clean, folder: Path) -> None:
    FAULTS["a space after the last colon"].inject(folder)
    found = clean.checks(folder, "tokenizer")
    assert "-{{ 'GPT4 Correct Assistant:' }}" in found["template"].message
    assert "+{{ 'GPT4 Correct Assistant: ' }}" in found["template"].message
    assert "single: character" in found["conversations"].message


@pytest.mark.slow
def test_a_fault_of_the_aligned_model_is_information(tmp_path: Path) -> None:
    aligned = write_model(tmp_path / "aligned")
    FAULTS["EOS 2 does not end turns"].inject(aligned)
    shutil.copytree(aligned, tmp_path / "out")
    result = door.verify(tmp_path / "out", against=aligned, quick=True)
    found = {check.name: check for check in result.checks}
    assert result.ok
    assert found["turn-end"].status == "info"
    assert "as in the aligned model" in found["turn-end"].message
    assert not door.verify(tmp_path / "out", quick=True).ok


@pytest.mark.slow
def test_a_donor_without_a_tokenizer(tmp_path: Path, expo) -> None:
    aligned = write_model(tmp_path / "aligned")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (aligned / name).unlink()
    shutil.copytree(aligned, tmp_path / "out")
    ran = expo("verify", tmp_path / "out", "--against", aligned, "--quick")
    assert ran.code == 0, ran.out
    assert "there is no tokenizer" in ran.out
    assert "(as in the aligned model)" in " ".join(ran.out.split())
    alone = expo("verify", tmp_path / "out", "--quick")
    assert alone.code == 3
    assert "there is no tokenizer with a vocabulary" in " ".join(alone.out.split())


def test_a_disk_that_fails_under_way_is_a_finding(clean: Clean, folder: Path) -> None:
    subject = clean.subject(folder, "")
    assert subject.shards
    shutil.copy(folder / FIRST, folder / "whole")
    (folder / FIRST).write_bytes(
        (folder / "whole").read_bytes()[:-5000]
    )  # after its header was read
    subject.tensor_facts = read_tensors(subject)
    found = {check.name: check for check in judge(subject).checks}
    assert found["readable"].status == "error"
    assert FIRST in found["readable"].message


@pytest.mark.slow
def test_verify_writes_nothing(clean: Clean, folder: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*"))
        }

    before = state()
    door.verify(folder, against=clean.aligned.files.root)
    assert state() == before


def test_quick_reads_no_tensor(clean: Clean, folder: Path) -> None:
    FAULTS["NaN"].inject(folder)
    found = {c.name: c.status for c in door.verify(folder, quick=True).checks}
    assert found["finite"] == found["all-zero"] == "skipped"


@pytest.mark.slow
def test_the_command(clean: Clean, folder: Path, expo) -> None:
    FAULTS["EOS 2 in generation config"].inject(folder)
    against = ("--against", clean.aligned.files.root)
    ran = expo("verify", folder, *against, "--quick", "--json")
    assert ran.code == 3
    content = json.loads(ran.out)
    assert content.keys() == {"ok", "checks"}
    assert content["ok"] is False
    assert [check["name"] for check in content["checks"]] == [check.name for check in CHECKS]
    assert all(check.keys() == {"name", "status", "message", "cure"} for check in content["checks"])
    table = expo("verify", folder, *against, "--quick")
    assert table.code == 3
    assert "NOT verified" in table.out.splitlines()[0]
    assert table.out.splitlines()[1].startswith("error ")
    assert not re.search(r"^(pass|unknown) ", table.out, flags=re.M)
    words = " ".join(table.out.split())
    assert "a turn ends with <|end_of_turn|> (32000), EOS of generation_config.json is 2" in words
    told = expo("verify", folder, *against, "--quick", "-v")
    assert all(re.search(rf"^{word} ", told.out, flags=re.M) for word in ("pass", "unknown"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 2, "nowhere does not exist"),
        (("file",), 2, "file is a file, not a model directory"),
        (("empty", "--vectors", "nowhere.yml"), 2, "nowhere.yml"),
        (
            ("empty", "--vectors", "bad.yml"),
            2,
            "bad.yml:1:1: schema: 'expo.golden/2' is not one of",
        ),
        (("empty", "--against", "nowhere/model/x"), 2, "nowhere/model/x"),
        (("empty", "--record", "v.yml"), 1, "empty has no tokenizer to record"),
        (("empty", "--record", "v.yml", "--quick"), 2, "--record only writes vectors"),
        (("empty", "--record", "file"), 1, "file exists"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expo, arguments, code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yml").write_text("schema: expo.golden/2\nname: x\nsource: y\ncases: []\n")
    ran = expo("verify", *arguments)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_an_empty_folder_is_a_finding(tmp_path: Path, expo) -> None:
    ran = expo("verify", tmp_path)
    assert ran.code == 3
    assert "there is no model.safetensors" in ran.out
    assert "there is no config.json" in ran.out


@pytest.mark.slow
def test_a_merge_that_does_not_verify_is_placed_and_marked(tmp_path: Path, expo) -> None:
    sft, aligned = write_model(tmp_path / "sft"), write_model(tmp_path / "aligned", seed=1)
    spec = tmp_path / "spec.yml"
    spec.write_text(
        f"merge_method: expo\nbase_model: {sft}\nverify: {{vectors: chatml}}\n"
        f"models: [{{model: {aligned}, parameters: {{alpha: 1.5}}}}]\n"
    )
    out = tmp_path / "out"
    ran = expo("merge", spec, out, verify=True)
    assert ran.code == 3
    assert f"{out}: NOT verified, 1 error" in ran.out
    assert "chatml, question" in " ".join(ran.err.split())
    manifest = json.loads((out / "expo.json").read_text())
    assert manifest["verified"] is False
    assert [c["name"] for c in manifest["verification"] if c["status"] == "error"]
    assert (out / "model.safetensors.index.json").exists()


@pytest.mark.slow
def test_a_merge_verifies_and_shows_the_template_diff(tmp_path: Path) -> None:
    sft, aligned = write_model(tmp_path / "sft"), write_model(tmp_path / "aligned", seed=1)
    (sft / "chat_template.jinja").write_text(TEMPLATE.replace("GPT4 Correct ", "", 1))
    result = door.extrapolate(sft, aligned, tmp_path / "out", alpha=1.5, dtype="float32")
    assert result.verified is True
    found = {check.name: check for check in result.checks}
    assert found["template-sft"].status == "info"
    assert "SFT" in found["template-sft"].message
    assert {name for name, check in found.items() if check.status in ("error", "warning")} == set()
    again = door.verify(tmp_path / "out", against=aligned, quick=True)
    assert {c.name for c in again.checks if c.status in ("error", "warning")} == set()
    unverified = door.extrapolate(sft, aligned, tmp_path / "no", alpha=1.5, verify=False)
    assert unverified.verified is None
    assert json.loads((tmp_path / "no" / "expo.json").read_text())["verified"] is None
