"""Signals at any moment, limits, and disks that fail: one line, the code that is documented, nothing left."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expo.cli.faults import in_words
from expo.cli.stopping import Stop, gently, mind_signals
from expo.errors import ExpoError
from expo.temporary import lock_directory, temporary_folder
from expo.threads import Crew

from .conftest import Pair, Ran
from .openchat import write_model

ENDS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
RESUME = "; what is finished is kept, run the same command again to resume"


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "expo", *words],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_minded(process: subprocess.Popen[str]) -> bool:
    """Whether the first lines of expo have run: until then it is Python that ends, in its own words."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def attack(folder: Path, words: list[str], tries: int, seed: int) -> None:
    """Signals at moments drawn by lot, to the process alone or as a terminal sends them."""
    chance = random.Random(seed)
    begun = time.monotonic()
    whole_run = start(folder, *words)
    whole_run.communicate(timeout=300)
    whole = time.monotonic() - begun
    for _ in range(tries):
        shutil.rmtree(folder / "out", ignore_errors=True)
        number = chance.choice([*ENDS])
        send = chance.choice([os.kill, os.killpg])
        with start(folder, *words) as process:
            while process.poll() is None and not is_minded(process):
                pass
            time.sleep(chance.uniform(0, whole))
            if process.poll() is None:
                send(process.pid, number)
            out, err = process.communicate(timeout=300)
        check(process.returncode, out, err, number, result=whole_run.returncode)
        assert eventually(lambda: not list((folder / "scratch").iterdir()))


def check(code: int, out: str, err: str, number: int, *, result: int = 0) -> None:
    """The one line of a signal, or all of a command that ends with `result`."""
    word, stopped = ENDS[signal.Signals(number)]
    assert code in (result, stopped), err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    if code == result:
        assert out
    else:
        assert err.splitlines()[-1] in (f"expo: {word}", f"expo: {word}{RESUME}")


def eventually(holds: Callable[[], bool]) -> bool:
    """Wait for what happens in any case, however slow the machine is."""
    return any(holds() or time.sleep(0.01) for _ in range(20_000))


def test_signals_while_it_starts_and_ends(tmp_path: Path) -> None:
    attack(tmp_path, ["--help"], tries=10, seed=0)


COMMANDS = {
    "plan": ["plan", "sft", "aligned"],
    "extrapolate": ["extrapolate", "sft", "aligned", "out", "--alpha", "1.3"],
    "verify": ["verify", "aligned", "--against", "sft"],
    "diff": ["diff", "sft", "aligned"],
}


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_signals_at_any_moment(tmp_path: Path, words: list[str]) -> None:
    write_model(tmp_path / "sft", seed=0)
    write_model(tmp_path / "aligned", seed=1)
    attack(tmp_path, words, tries=5, seed=1)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_gentle_where_something_has_to_be_waited_for(handlers: None) -> None:
    mind_signals()
    at_once = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stop) as stop, gently():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is at_once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    mind_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_of_the_program_signals_are_python_s(handlers: None) -> None:
    with pytest.raises(KeyboardInterrupt), gently():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_folder_is_its_users_alone_and_goes_with_its_context(scratch: Path) -> None:
    with temporary_folder() as folder:
        (folder / "file").write_text("x")
        assert folder.parent == scratch
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(scratch.iterdir()) == []


def test_what_was_killed_with_all_that_it_had_started_goes_with_the_next(scratch: Path) -> None:
    (scratch / "expo-run-dead").mkdir()
    (scratch / "expo-run-dead" / "file").write_text("x")
    (scratch / "expo-run-link").symlink_to(scratch / "mine")
    (scratch / "mine").mkdir()
    alive = lock_directory(scratch / "expo-run-alive")
    with temporary_folder():
        pass
    os.close(alive)
    assert sorted(p.name for p in scratch.iterdir()) == [
        "expo-run-alive",
        "expo-run-link",
        "mine",
    ]


def test_threads_that_cannot_start_are_one_line(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    before = threading.stack_size(1 << 46)  # more than there is: the system refuses
    try:
        with pytest.raises(ExpoError, match="a thread cannot be started"), Crew() as crew:
            crew.start(lambda: None)
        ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    finally:
        threading.stack_size(before)
    assert ran.code == 1
    assert ran.err.startswith("expo: a thread cannot be started: raise the limits ")
    assert ran.err.count("\n") == 1


LIMITS = {
    "memory for the program": (resource.RLIMIT_AS, 20_000_000, "memory"),
    "memory": (resource.RLIMIT_AS, 50_000_000, "memory"),
    "files": (resource.RLIMIT_NOFILE, 5, "oo many"),
}


@pytest.mark.parametrize(("limit", "value", "said"), LIMITS.values(), ids=LIMITS)
def test_a_limit_is_one_line(pair: Pair, tmp_path: Path, limit: int, value: int, said: str) -> None:
    words = ["extrapolate", str(pair.sft), str(pair.aligned), "out", "--alpha", "1.3"]
    done = subprocess.run(
        [sys.executable, "-m", "expo", *words, "--no-verify", "-q"],
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(limit, (value, value)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("expo: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_the_disk_does_not_give_is_one_line(
    pair: Pair, expo: Callable[..., Ran]
) -> None:
    (pair.aligned / "config.json").unlink()
    (pair.aligned / "config.json").symlink_to("/proc/self/mem")  # the system says EIO
    ran = expo("plan", pair.sft, pair.aligned)
    assert ran.code == 1
    assert ran.err == "expo: aligned/config.json cannot be read: Input/output error\n"


def test_a_folder_that_cannot_be_looked_at_is_one_line(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> None:
    stat = os.stat

    def fails(path: os.PathLike[str], **more: bool) -> os.stat_result:
        if str(path).endswith("LICENSE"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **more)

    (pair.aligned / "LICENSE").write_text("MIT")
    monkeypatch.setattr(os, "stat", fails)
    ran = expo("plan", pair.sft, pair.aligned)
    assert ran.code == 1
    assert ran.err == f"expo: {pair.aligned}/LICENSE cannot be read: Input/output error\n"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (MemoryError(), "there is not enough memory: "),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "there is not enough memory: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "there is not enough memory: "),
        (RuntimeError("can't start new thread"), "no more processes can be started: "),
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no more processes can be started: "),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"), "too many files are open: "),
        (OSError(errno.EIO, os.strerror(errno.EIO), "a\x1b"), "a\\x1b: Input/output error: the disk "),
        (OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "a"), "a: Not a directory"),
        (OSError("no usable folder\nat all"), "no usable folder"),
        (ImportError("no numpy\nat all"), "a library cannot be loaded (no numpy): install expo again"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line_with_the_cure(fault: Exception, words: str) -> None:
    said = in_words(fault)
    assert said is not None
    assert said.startswith(words)
    assert "\n" not in said


def test_a_mistake_in_expo_is_none_of_the_systems() -> None:
    assert in_words(RuntimeError("generator raised StopIteration")) is None
