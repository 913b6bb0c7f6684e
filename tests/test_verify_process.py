"""Verify: what the child processes leave behind, and what they say when they fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import expo as door
from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.verification import probe, tokenizer
from expo.verification.budget import bounded, reports
from expo.verification.process import Process, Report, _what_matters
from expo.verification.run import judge
from expo.verification.subject import Reports, Subject

from .clean import Clean
from .openchat import TEMPLATE, write_model, write_tokenizer

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True}

_SAYS = """
Traceback (most recent call last):
  File "x.py", line 1, in <module>
ImportError:
LlamaTokenizer requires the SentencePiece library but it was not found in your environment.
Check out the instructions on the installation page.

"""


def test_an_error_is_kept_with_its_whole_message() -> None:
    words = _what_matters(_SAYS)
    assert words.startswith("ImportError: LlamaTokenizer requires the SentencePiece library")
    assert _what_matters("a\nKilled\n") == "Killed"
    assert _what_matters("") == ""


@pytest.mark.parametrize("package", ["sentencepiece", "tiktoken", "mistral-common"])
def test_a_tokenizer_that_needs_a_package_is_an_error_for_whoever_has_it(
    tmp_path: Path, package: str
) -> None:
    model = write_model(tmp_path / "model")
    aligned = open_checkpoint(parse_reference(str(model), role="ALIGNED"))
    failed = Report((), f"ImportError: it requires the {package} library but it was not found")
    subject = Subject(open_directory(model), aligned, reports=Reports(failed, failed))
    (found,) = [check for check in judge(subject).checks if check.name == "tokenizer-loads"]
    assert found.status == "error"
    assert found.message.startswith(f"not checked, it needs a newer {package} than ")
    assert found.cure == f"pip install --upgrade {package}"


@pytest.mark.parametrize(
    ("files", "needs"),
    [
        (("tokenizer.model",), ["sentencepiece", "protobuf"]),
        (("spiece.model", "config.json"), ["sentencepiece", "protobuf"]),
        (("tekken.json",), ["mistral-common"]),
        (("qwen.tiktoken",), ["tiktoken"]),
        (("tokenizer.model", "tokenizer.json"), []),
    ],
)
def test_a_kind_of_vocabulary_names_the_packages_that_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], needs: list[str]
) -> None:
    """transformers says "Error parsing line" where sentencepiece is missing."""
    monkeypatch.setattr(tokenizer, "_installed", lambda package: None)
    for name in files:
        (tmp_path / name).write_text("{}")
    failure = "ValueError: Error parsing line b'x' in the folder/tokenizer.model"
    assert tokenizer.needed_packages(open_directory(tmp_path), failure) == needs
    if needs:
        subject = Subject(open_directory(tmp_path), reports=Reports(Report((), failure)))
        (found,) = [check for check in judge(subject).checks if check.name == "tokenizer-loads"]
        assert found.status == "error"
        assert found.message == f"not checked, it needs {' and '.join(needs)}"
        assert found.cure == f"pip install {' '.join(needs)}"


@pytest.mark.slow
def test_a_vocabulary_of_sentencepiece_loads(tmp_path: Path) -> None:
    package = find_spec("mistral_common")
    assert package is not None
    assert package.origin is not None
    pieces = Path(package.origin).parent / "data" / "tokenizer.model.v1"
    shutil.copy(pieces, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    request = {"task": "tokenizer", "folder": str(tmp_path), "texts": [], "conversations": []}
    with Process(request) as process:
        report = process.report()
    assert report.failure is None
    loaded = report.first("loaded")
    assert loaded is not None
    assert loaded["loaded"]["tokens"] == 32000


def test_added_tokens_of_a_tokenizer_that_refuses_to_list_them() -> None:
    class Refuses:
        """As mistral-common's: a method in the place of the property."""

        all_special_tokens = ("<s>", "</s>")
        all_special_ids = (1, 2)

        def added_tokens_decoder(self) -> None:
            raise NotImplementedError

    assert probe._added(Refuses()) == {"<s>": 1, "</s>": 2}


def test_a_failure_reads_the_same_for_two_folders(tmp_path: Path) -> None:
    failures = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")
        request = {"task": "tokenizer", "folder": str(folder), "texts": [], "conversations": []}
        with Process(request) as process:
            failures.append(process.report().failure)
    assert failures[0]
    assert failures[0] == failures[1]


def test_a_model_is_built_from_names_dtypes_and_shapes() -> None:
    made = probe._without_values({"a": ("F8_E4M3", [2, 3]), "b": ("BF16", []), "c": ("U8", [0])})
    assert {name: (str(t.dtype), t.shape, t.device.type) for name, t in made.items()} == {
        "a": ("torch.float8_e4m3fn", (2, 3), "meta"),
        "b": ("torch.bfloat16", (), "meta"),
        "c": ("torch.uint8", (0,), "meta"),
    }


def test_a_child_ends_whose_parent_has_ended_already() -> None:
    command = [sys.executable, "-P", str(probe.__file__), "0"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    model, aligned = write_model(tmp_path / "model"), write_model(tmp_path / "aligned")
    with (aligned / "config.json").open("a") as configuration:
        configuration.write("\n")  # else one process speaks for both tokenizers
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "expo", "verify", str(model), "--against", str(aligned)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        assert _eventually(lambda: len(list(scratch.glob("expo-*"))) >= 3)
        run.send_signal(signal.SIGKILL)
    assert _eventually(lambda: not list(scratch.iterdir()))


def _eventually(holds) -> bool:
    """Wait for what happens in any case, however slow the machine is."""
    return any(holds() or time.sleep(0.05) for _ in range(20_000))


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
    with Process(request) as process:
        assert _eventually(lambda: b'"text"' in process.said)  # it is loaded, and goes on
        report = process.report(seconds=0)
    assert report.failure == "did not end in time"
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


def _template_request(folder: Path, template: str, conversations: int = 1) -> dict:
    write_tokenizer(folder, template=template)
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return {
        "task": "tokenizer",
        "folder": str(folder),
        "texts": [],
        "conversations": [HELLO] * conversations,
    }


@pytest.mark.parametrize(
    "pieces", ["{{ 'x' * 100000000 }}", "{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}"]
)
def test_a_text_without_measure_is_neither_tokenized_nor_handed_on(
    tmp_path: Path, pieces: str
) -> None:
    with Process(_template_request(tmp_path, pieces)) as process:
        report = process.report()
        assert len(process.said) < 10_000
    came = report.first("conversation")
    assert came is not None
    assert "characters, where 1048576 is far too many" in came["error"]
    assert report.failure is None


def test_what_a_child_tells_is_bounded(tmp_path: Path) -> None:
    """The parent reads all of it, and takes several times as much memory to do so."""
    with Process(_template_request(tmp_path, "{{ 'é' * 1000000 }}", conversations=30)) as process:
        report = process.report()
        assert len(process.said) < 1 << 24
    assert report.failure == "gives more than 16 MB to look at"
    assert report.first("conversation") is not None


def test_an_error_is_not_longer_than_it_is_read(tmp_path: Path) -> None:
    with Process(_template_request(tmp_path, "{{ raise_exception('x' * 9999999) }}")) as process:
        came = process.report().first("conversation")
    assert came is not None
    assert len(came["error"]) < 1100


def test_all_children_share_one_budget_of_memory(tmp_path: Path) -> None:
    """The largest is ended, the others go on."""
    honest, greedy = tmp_path / "honest", tmp_path / "greedy"
    requests = [_template_request(honest, TEMPLATE), _template_request(greedy, _GREEDY)]
    with (
        Process(requests[0]) as first,
        Process(requests[1]) as second,
        bounded([first, second], memory_bytes=400 << 20),
    ):
        came = reports([first, None, second])
    assert came[1] is None
    assert [report.failure for report in came if report] == [
        None,
        "took more memory than the 0.4 GB that a verification has",
    ]


_GREEDY = "{% set n = namespace(x='x' * 500000000) %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_all_children_share_one_time(tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    request = _template_request(tmp_path, endless)
    with Process(request) as first, Process(request) as second:
        assert _eventually(lambda: b'"loaded"' in first.said and b'"loaded"' in second.said)
        came = reports([first, second], seconds=0)
    assert [report.failure for report in came if report] == ["did not end in time"] * 2


def test_a_loop_ends_with_its_processor_time(tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with Process(_template_request(tmp_path, endless), seconds=4) as process:
        report = process.report(seconds=600)
    assert report.failure == "took more than 4 s of processor time"


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
