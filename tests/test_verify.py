"""Verify: a clean folder has no finding, and every injected fault is named by its check."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import expo as door
from expo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.verification.check import CheckResult
from expo.verification.golden import Golden, TokenizerFacts, read_golden
from expo.verification.process import Process
from expo.verification.run import CHECKS, Tokenizers, _start_load, judge
from expo.verification.subject import Reports, Subject
from expo.verification.tensors import read_tensors

from .faults import CARD_BLIND, FAULTS, FIRST
from .openchat import TEMPLATE, write_model, write_tokenizer
from .templates import TEMPLATES

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True}
VECTORS = Path(__file__).parent.parent / "merge_configs" / "vectors"


@dataclass(frozen=True)
class Clean:
    """An OpenChat pair, its merge, and what the child processes say of the merge."""

    out: Path
    aligned: Checkpoint
    reports: Reports
    golden: Golden

    def subject(self, folder: Path, reads: str) -> Subject:
        """The facts about a changed copy: those that the change touches are taken anew."""
        subject = Subject(open_directory(folder), self.aligned, golden=self.golden)
        with ExitStack() as stack:
            out, load = self.reports.out, self.reports.load
            if reads == "tensors":
                subject.tensor_facts = read_tensors(subject)
            elif reads == "load":
                loading = _start_load(subject, stack)
                load = loading.report() if loading else None
            elif reads == "tokenizer":
                tokenizers = stack.enter_context(Tokenizers(folder, None, self.golden))
                out = tokenizers.reports()[0]
            subject.reports = Reports(out, self.reports.aligned, load)
        return subject

    def checks(self, folder: Path, reads: str) -> dict[str, CheckResult]:
        return {check.name: check for check in judge(self.subject(folder, reads)).checks}


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    root = tmp_path_factory.mktemp("openchat")
    write_model(root / "sft", seed=0)
    write_model(root / "aligned", seed=1)
    door.extrapolate(root / "sft", root / "aligned", root / "out", alpha=1.5, verify=False)
    aligned = open_checkpoint(parse_reference(str(root / "aligned"), role="ALIGNED"))
    golden = read_golden(VECTORS / "openchat.yml")
    subject = Subject(open_directory(root / "out"), aligned, golden=golden)
    with Tokenizers(root / "out", aligned, golden) as tokenizers, ExitStack() as stack:
        loading = _start_load(subject, stack)
        assert loading is not None
        reports = Reports(*tokenizers.reports(), loading.report())
    return Clean(root / "out", aligned, reports, golden)


@pytest.fixture
def folder(clean: Clean, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(clean.out, tmp_path / "out")
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


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


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_its_check(clean: Clean, folder: Path, name: str) -> None:
    fault = FAULTS[name]
    before = clean.checks(folder, "")[fault.check].status
    fault.inject(folder)
    subject = clean.subject(folder, fault.reads)
    after = {check.name: check for check in judge(subject).checks}[fault.check]
    assert before in ("pass", "skipped"), before
    assert after.status == fault.status, after
    assert fault.says in after.message, after
    assert after.cure or after.status == "info"
    if name in CARD_BLIND:  # the three published vectors are necessary, not sufficient
        for case in clean.golden.cases[:3]:
            assert case.text is not None
            assert case.name.startswith("card")
            assert subject.tokenizer.texts[case.text]["ids"] == case.ids


def test_a_failing_vector_shows_position_and_tokens(clean: Clean, folder: Path) -> None:
    FAULTS["no prepended space"].inject(folder)
    (found,) = [c for c in judge(clean.subject(folder, "tokenizer")).checks if c.name == "vectors"]
    assert found.status == "error"
    assert "openchat, card, single turn: position 1 after '<s>' is" in found.message
    assert "420 " in found.message
    assert "expected" in found.message


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_vectors_hold_for_their_template_and_for_no_other(tmp_path: Path, name: str) -> None:
    template, bos, eos = TEMPLATES[name]
    write_tokenizer(tmp_path, template=template, bos=bos, eos=eos)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    other = "chatml" if name != "chatml" else "zephyr"
    for golden in (
        _without_other_ids(read_golden(VECTORS / f"{file}.yml")) for file in (name, other)
    ):
        with Tokenizers(tmp_path, None, golden) as tokenizers:
            reports = Reports(tokenizers.reports()[0])
        subject = Subject(open_directory(tmp_path), golden=golden, reports=reports)
        (found,) = [check for check in judge(subject).checks if check.name == "vectors"]
        assert (found.status == "pass") == (golden.name == name), found.message
    assert {path.stem for path in VECTORS.glob("*.yml")} == set(TEMPLATES)


def _without_other_ids(golden: Golden) -> Golden:
    """Without the ids of vocabularies other than Mistral's, which the tests' tokenizer has."""
    if golden.name in ("openchat", "mistral-instruct"):
        return golden
    cases = [case.model_copy(update={"ids": None}) for case in golden.cases]
    return golden.model_copy(update={"cases": cases, "tokenizer": TokenizerFacts()})


@pytest.mark.parametrize(
    ("name", "file", "status"),
    [
        ("chatml", "chatml", "pass"),
        ("llama-3-instruct", "llama3", "error"),  # it writes a newline after <|eot_id|>
    ],
)
def test_the_vectors_judge_templates_that_others_wrote(
    tmp_path: Path, name: str, file: str, status: str
) -> None:
    from importlib.resources import files

    template = (files("mergekit") / "_data" / "chat_templates" / f"{file}.jinja").read_text()
    _, bos, eos = TEMPLATES[name]
    write_tokenizer(tmp_path, template=template, bos=bos, eos=eos)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    golden = read_golden(VECTORS / f"{name}.yml")
    with Tokenizers(tmp_path, None, golden) as tokenizers:
        reports = Reports(tokenizers.reports()[0])
    subject = Subject(open_directory(tmp_path), golden=golden, reports=reports)
    (found,) = [check for check in judge(subject).checks if check.name == "vectors"]
    assert found.status == status, found.message


def test_the_ids_of_mistral_are_mistrals_own() -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    request = ChatCompletionRequest(messages=[UserMessage(content="Hello")])
    own = MistralTokenizer.v1().encode_chat_completion(request).tokens
    golden = read_golden(VECTORS / "mistral-instruct.yml")
    assert golden.cases[0].ids == own
    messages = [UserMessage(content="Hello"), AssistantMessage(content="Hi")]
    request = ChatCompletionRequest(messages=[*messages, UserMessage(content="How are you today?")])
    three = MistralTokenizer.v1().encode_chat_completion(request).tokens
    assert [case.ids for case in golden.cases if case.text is not None] == [three]


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


def test_a_template_that_never_ends(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(endless + TEMPLATE)
    request = {
        "task": "tokenizer",
        "folder": str(tmp_path),
        "texts": ["Hello"],
        "conversations": [HELLO],
    }
    with Process(request, seconds=4) as process:
        report = process.report()
    assert report.failure is not None
    assert report.first("loaded") is not None
    assert report.first("conversation") is None


def test_a_template_that_eats_memory(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "chat_template.jinja").write_text("{{ 'a' * 10000000000 }}")
    request = {
        "task": "tokenizer",
        "folder": str(tmp_path),
        "texts": [],
        "conversations": [HELLO],
    }
    with Process(request, memory_bytes=1 << 30) as process:
        report = process.report()
    came = report.first("conversation")
    assert came is None or "MemoryError" in came["error"]


def test_the_child_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expo.verification.process import _environment

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment = _environment(str(tmp_path))
    assert not {"hf_secret", "secret"} & set(environment.values())
    assert environment["HOME"] == environment["HF_HOME"] == str(tmp_path)
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_remote_code_is_not_run(clean: Clean, folder: Path, tmp_path: Path) -> None:
    """A folder that brings its own tokenizer class: nothing of it may run."""
    witness = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w').write('x')\nclass T: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = json.loads((folder / "config.json").read_text())
    model |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.T", "AutoModel": "evil.T"}}
    (folder / "config.json").write_text(json.dumps(model))
    result = door.verify(folder, quick=True)
    assert not witness.exists()
    assert not (folder / "__pycache__").exists()
    assert {check.name: check for check in result.checks}["tokenizer-loads"].status != "pass"


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
def test_recorded_vectors_hold(clean: Clean, tmp_path: Path, expo) -> None:
    file = tmp_path / "vectors.yml"
    assert expo("verify", clean.out, "--record", file).code == 0
    golden = read_golden(file)
    assert golden.self_recorded
    assert len(golden.cases) > 50
    ran = expo("verify", clean.out, "--vectors", file, "--quick", "--json")
    found = {check["name"]: check for check in json.loads(ran.out)["checks"]}
    assert found["vectors"]["status"] == "pass", found["vectors"]
    assert "self-recorded" in found["vectors-source"]["message"]


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


GARBAGE = (
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b"[" * 100_000,
    b'{"a": 1}',
    b"\0" * 5000,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "expo.json",
             "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", FIRST],
)  # fmt: skip
def test_whatever_is_in_a_file_is_a_finding(clean: Clean, folder: Path, name: str) -> None:
    for content in GARBAGE:
        (folder / name).write_bytes(content)
        result = judge(clean.subject(folder, "tensors"))
        assert not result.ok, content


WEIRD = (None, [], {}, "x", -1, 0, 1.5, 10**400, True, [None], [[1]], {"a": {"b": []}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "expo.json",
             "tokenizer_config.json"],
)  # fmt: skip
def test_whatever_type_a_value_has_is_a_finding(clean: Clean, folder: Path, name: str) -> None:
    original = json.loads((folder / name).read_text())
    for key in [*original, "chat_template", "text_config"]:
        for value in WEIRD:
            (folder / name).write_text(json.dumps(original | {key: value}))
            names = [check.name for check in judge(clean.subject(folder, "")).checks]
            assert names == [check.name for check in CHECKS]
