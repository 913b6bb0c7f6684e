"""Starting the child process: no secrets, offline, bounded; and reading what it said."""

import json
import os
import re
import resource
import signal
import site
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from expo.checkpoint.headers import printable
from expo.temporary import temporary_folder

MEMORY_BYTES = 2 << 30
SECONDS = 60  # of processor time
WAIT_SECONDS = 300  # on a machine that is busy with other things

_TALK_BYTES = 8000
_ERROR = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b")

_PROGRAM = Path(__file__).with_name("probe.py")
_KEPT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)
_SET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONIOENCODING": "utf-8",
}


@dataclass(frozen=True)
class Report:
    """What the child said, line by line, and why it did not get to the end, if so."""

    lines: tuple[dict, ...]
    failure: str | None

    def first(self, key: str) -> dict | None:
        """The first line that has `key`."""
        return next((line for line in self.lines if key in line), None)


class Process:
    """One child at work. Leaving the context kills it if it still runs."""

    def __init__(
        self, request: dict, *, memory_bytes: int = MEMORY_BYTES, seconds: int = SECONDS
    ) -> None:
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._stack = stack = ExitStack()
        self._folder = str(request.get("folder", ""))
        self._ended_for: str | None = None
        try:
            self._start(request)
        except BaseException:
            stack.close()
            raise

    def _start(self, request: dict) -> None:
        stack = self._stack
        home = str(stack.enter_context(temporary_folder()))
        self._said = stack.enter_context(_unnamed_file(home))
        self._talk = stack.enter_context(_unnamed_file(home))
        limits = {"memory_bytes": self._memory_bytes, "cpu_seconds": self._seconds}
        with _unnamed_file(home) as stdin:
            stdin.write(json.dumps(request | limits).encode())
            stdin.seek(0)
            # -P: the folder of the script is not on its path, so no module there shadows another
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(os.getpid())],
                stdin=stdin,
                stdout=self._said,
                stderr=self._talk,
                cwd=home,
                env=_environment(home),
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._stack.close()

    @property
    def said(self) -> bytes:
        """What the child has said so far."""
        return os.pread(self._said.fileno(), os.fstat(self._said.fileno()).st_size, 0)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def own_bytes(self) -> int:
        """Memory that it shares with nobody; 0 once it has ended, or where the system does not tell."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        except OSError:
            return 0
        return (int(pages[1]) - int(pages[2])) * resource.getpagesize()

    def end(self, reason: str) -> None:
        """Kill it; its report names the reason."""
        self._ended_for = reason
        self._process.kill()

    def report(self, seconds: float = WAIT_SECONDS) -> Report:
        """Wait for the child to end, or end it when so much time has passed from now on."""
        failure = None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
            failure = "did not end in time"
        lines = tuple(_lines(self.said, self._folder))
        if failure is None and not (code == 0 and lines and "done" in lines[-1]):
            failure = self._last_words(code)
        return Report(lines, failure)

    def _last_words(self, code: int) -> str:
        if self._ended_for is not None:
            return self._ended_for
        if code == -signal.SIGXCPU:
            return f"took more than {self._seconds} s of processor time"
        if code < 0:
            limits = f"{self._seconds} s and {self._memory_bytes / 1e9:.1f} GB of memory"
            return f"was killed by signal {-code} (its limits are {limits})"
        said = os.fstat(self._talk.fileno()).st_size
        talk = os.pread(self._talk.fileno(), _TALK_BYTES, max(0, said - _TALK_BYTES))
        words = _what_matters(_nameless(talk.decode(errors="replace"), self._folder))
        return printable(words, 400) if words else f"ended with code {code}"


def _unnamed_file(folder: str) -> IO[bytes]:
    """A file instead of a pipe: the child never waits for somebody to read."""
    return tempfile.TemporaryFile(dir=folder)


def _lines(raw: bytes, folder: str) -> list[dict]:
    said = _nameless(raw.decode(errors="replace"), folder)
    whole = [line for line in said.split("\n")[:-1] if line]  # a torn last line is dropped
    return [json.loads(line) for line in whole]


def _nameless(text: str, folder: str) -> str:
    """Without the path of the folder: the same failure reads the same for two of them."""
    return text.replace(folder, "the folder") if folder else text


def _what_matters(talk: str) -> str:
    """Of a traceback the error with its whole message, of other talk the last line."""
    lines = talk.strip().splitlines()
    starts = [n for n, line in enumerate(lines) if _ERROR.match(line)]
    kept = lines[starts[-1] :] if starts else lines[-1:]
    return " ".join(line.strip() for line in kept if line.strip())


def _environment(home: str) -> dict[str, str]:
    """Enough to find Python and its packages, nothing that could hold a token."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    homes = dict.fromkeys(("HOME", "HF_HOME", "TMPDIR"), home)
    return kept | homes | {"PYTHONUSERBASE": site.getuserbase()} | _SET
