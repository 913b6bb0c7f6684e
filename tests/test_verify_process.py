"""Verify: what the child processes leave behind, and what they say when they fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.files import open_directory
from expo.checkpoint.reference import parse_reference
from expo.verification.process import Process, Report, _what_matters, temporary_folder
from expo.verification.run import judge
from expo.verification.subject import Reports, Subject

from .openchat import write_model

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
    assert f"pip install {package}" in found.message


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


def test_a_temporary_folder_goes_with_its_context(tmp_path: Path) -> None:
    with temporary_folder("x-", str(tmp_path)) as folder:
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "expo", "verify", str(model), "--against", str(model)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        assert _within_a_minute(lambda: len(list(scratch.glob("expo-*"))) >= 3)
        run.send_signal(signal.SIGKILL)
    assert _within_a_minute(lambda: not list(scratch.glob("expo-*")) and not _headers(model))


def _headers(model: Path) -> list[Path]:
    """Stand-ins of this model in shared memory."""
    links = Path("/dev/shm").glob("expo-headers-*/config.json")
    return [link for link in links if link.resolve() == (model / "config.json").resolve()]


def _within_a_minute(holds) -> bool:
    return any(holds() or time.sleep(0.05) for _ in range(1200))
