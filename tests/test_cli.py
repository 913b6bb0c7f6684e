"""The command line's manners: help, JSON, streams, imports."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class

import expo as door
from expo.cli.main import cli
from expo.cli.output import Meter, Output, table
from expo.demo.toy import MODELS
from expo.planning.findings import gigabytes
from expo.verification.run import CHECKS

from .conftest import Pair, Ran


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom expo.cli.main import main\n"
        "try: main([sys.argv[1]])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'pydantic', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    for flag in ("--help", "--version", "-h"):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
        assert done.stderr.strip() == "[]"
        assert done.stdout


def test_planning_imports_no_torch(pair: Pair) -> None:
    code = (
        "import sys\nfrom expo.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as e: assert e.code == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "plan", str(pair.sft), str(pair.aligned)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.strip() == "False"


def test_import_expo_is_cheap() -> None:
    code = "import sys, expo; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [None, *sorted(cli.commands)])
def test_every_help_ends_with_examples_or_exit_codes(
    name: str | None, expo: Callable[..., Ran]
) -> None:
    ran = expo(*([name] if name else []), "--help")
    assert ran.code == 0
    assert ("Example" if name else "Exit codes") in ran.out
    assert max(map(len, ran.out.splitlines())) <= 100


def test_flags_follow_the_verb_in_any_order(pair: Pair, expo: Callable[..., Ran]) -> None:
    first = expo("plan", "--json", pair.sft, "--alpha", 1.5, pair.aligned, "--seed", 3)
    second = expo("plan", pair.sft, pair.aligned, "--seed", 3, "--alpha", 1.5, "--json")
    assert first.code == 0
    drop = re.compile(r'"free_disk_bytes": \d+')
    assert drop.sub("", first.out) == drop.sub("", second.out)


def test_json_is_all_that_stdout_holds(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    flags = ("--alpha", 1.5, "--json")
    planned = json.loads(expo("plan", pair.sft, pair.aligned, *flags).out)
    assert set(planned) == set(door.PlanReport.__dataclass_fields__)
    ran = json.loads(expo("extrapolate", pair.sft, pair.aligned, tmp_path / "o", *flags).out)
    assert set(ran) == set(door.MergeResult.__dataclass_fields__)
    compared = json.loads(expo("diff", pair.sft, pair.aligned, "--json").out)
    assert set(compared) == set(door.DiffResult.__dataclass_fields__)


def test_quiet_silences_the_talk_not_the_data(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "o", "--alpha", 1.5, "-q")
    assert ran.err == ""
    asked, got, out = ran.out.splitlines()
    assert asked == "asked  ExPO, alpha 1.5 (paper alpha 0.5), bfloat16, rounded to nearest"
    assert got.startswith("got    effective alpha 1.")
    assert out.startswith(f"out    {tmp_path / 'o'}: not verified, ")


def test_no_verify_is_accepted(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    flags = ("--alpha", 1.5, "--no-verify", "-q")
    assert expo("extrapolate", pair.sft, pair.aligned, tmp_path / "o", *flags).code == 0


def test_the_dry_run_is_the_plan(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    out = tmp_path / "o"
    dry = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5, "--dry-run", "--json")
    plan = expo("plan", pair.sft, pair.aligned, "--alpha", 1.5, "--out", out, "--json")
    assert {**json.loads(dry.out), "free_disk_bytes": 0} == {
        **json.loads(plan.out),
        "free_disk_bytes": 0,
    }
    assert not out.exists()


def test_plan_takes_a_spec_or_a_pair(expo: Callable[..., Ran], tmp_path: Path) -> None:
    assert expo("plan", "a", "b", "c").code == 2
    assert expo("plan").code == 2
    assert expo("plan", tmp_path / "none.yml").code == 2
    assert expo("plan", tmp_path / "none.yml", "--alpha", 1.5).code == 2
    assert expo("nonsense").code == 2


def test_a_closed_pipe_is_one_line(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        ran = expo("plan", pair.sft, pair.aligned)
    assert ran.err == "expo: what came out could not be printed (Broken pipe)\n"
    assert ran.code == 1


def test_a_full_disk_under_stdout_is_one_line_to_the_end_of_the_process(pair: Pair) -> None:
    command = f"{sys.executable} -m expo plan {pair.sft} {pair.aligned} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr.count("\n") == done.returncode == 1


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put a stream in place of stdout or stderr that takes nothing."""
    with ExitStack() as stack:

        def replace(name: str) -> None:
            stream = stack.enter_context(Path("/dev/full").open("w"))
            monkeypatch.setattr(sys, name, stream)

        yield replace


PRINTING = {
    "help": ("--help",),
    "help of a verb": ("merge", "--help"),
    "version": ("--version",),
    "list": ("merge", "--list"),
    "schema": ("plan", "--schema"),
    "plan": ("plan", "SFT", "ALIGNED"),
    "JSON": ("plan", "SFT", "ALIGNED", "--json"),
    "diff": ("diff", "SFT", "ALIGNED"),
    "spectrum": ("spectrum", "ALIGNED"),
    "verify": ("verify", "EMPTY", "--quick"),
    "spec": ("extrapolate", "SFT", "ALIGNED", "OUT", "--alpha", "1.5", "--print-spec"),
}


@pytest.mark.parametrize("words", PRINTING.values(), ids=PRINTING)
def test_a_full_stdout_is_one_line(
    words: tuple[str, ...],
    pair: Pair,
    tmp_path_factory: pytest.TempPathFactory,
    full: Callable[[str], None],
    expo: Callable[..., Ran],
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    places = {"SFT": pair.sft, "ALIGNED": pair.aligned, "EMPTY": empty}
    full("stdout")
    ran = expo(*(places.get(word, word) for word in words))
    said = ran.err.splitlines()[-1]
    assert said == "expo: what came out could not be printed (No space left on device)"
    assert ran.code == 1


def test_a_full_stdout_leaves_the_output_in_place(
    pair: Pair, tmp_path: Path, full: Callable[[str], None], expo: Callable[..., Ran]
) -> None:
    out = tmp_path / "o"
    full("stdout")
    ran = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5)
    reason = "No space left on device"
    line = f"expo: what came out could not be printed ({reason}); in place: {out}"
    assert ran.err.splitlines()[-1] == line
    assert ran.code == 1
    assert (out / "expo.json").exists()


def test_talk_that_nobody_hears_fails_nothing(
    pair: Pair, tmp_path: Path, full: Callable[[str], None], expo: Callable[..., Ran]
) -> None:
    full("stderr")
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "o", "--alpha", 1.5)
    assert ran.code == 0
    assert ran.out.startswith("asked")


def test_no_colour_and_no_bar_off_a_terminal(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "o", "--alpha", 1.5)
    assert "\x1b" not in ran.out + ran.err
    assert "\r" not in ran.err


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_the_verification_shows_its_own_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    words = (MODELS / "sft", MODELS / "aligned", tmp_path / "o", "--alpha", 1.5)
    assert expo("extrapolate", *words, verify=True).code == 0
    shown = terminal.getvalue()
    assert shown.index("o: ") < shown.index("verifying: ") < shown.index("wrote ")
    assert f"/{len(CHECKS) + 1} steps [" in shown


def test_the_rate_counts_the_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the wait before it, nor what an earlier run has left."""
    clock = iter([50.0, 60.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = Meter(lambda *_: None)
    meter(4 * 10**9, 8 * 10**9)
    meter(8 * 10**9, 8 * 10**9)
    assert (meter.done, meter.seconds, meter.rate) == (4 * 10**9, 10.0, 4e8)


def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert expo("verify", tmp_path, "--quick").code == 3
    monkeypatch.setenv("NO_COLOR", "1")
    coloured = terminal.getvalue()
    assert expo("verify", tmp_path, "--quick").code == 3
    assert "\x1b[31merror" in coloured
    assert "\x1b" not in terminal.getvalue().removeprefix(coloured)


def test_every_figure_comes_when_asked(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "o", "--alpha", 1.5, "-v")
    assert "of the weights did not move" in ran.out
    assert "stochastic rounding would give about" in ran.out
    assert re.search(r"^mlp\.up_proj +1\.5 +1\.", ran.out, flags=re.M)


def test_log_lines_come_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, *(t for t in (1.0, 20.0, 21.0, 40.0) for _ in range(2))])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Output().progress("out") as update:
        for done in (1, 2, 3, 4):
            update(done * 10**9, 8 * 10**9)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "out: 2.00 GB of 8.00 GB, 52.6 MB/s, 114 s left",
        "out: 4.00 GB of 8.00 GB, 76.9 MB/s, 52 s left",
    ]


def test_small_words() -> None:
    assert gigabytes(14_480_000_000) == "14.48 GB"
    assert gigabytes(1_500_000) == "1.50 MB"
    assert gigabytes(4_460) == "4.46 KB"
    assert gigabytes(0) == "0 bytes"
    assert table(("a", "b"), [("x", "10"), ("yy", "2")]) == "a    b\nx   10\nyy   2"


def test_the_public_door_is_explicit_sorted_and_small() -> None:
    assert door.__all__ == sorted(door.__all__)
    assert len(door.__all__) <= 30
    for name in door.__all__:
        assert getattr(door, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        door.nothing  # noqa: B018


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_complete_as_documented(shell: str) -> None:
    usage = (Path(__file__).parent.parent / "docs" / "usage.md").read_text()
    assert f"_EXPO_COMPLETE={shell}_source expo" in usage
    environment = os.environ | {"_EXPO_COMPLETE": f"{shell}_source"}
    command = [sys.executable, "-m", "expo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"_EXPO_COMPLETE={shell}_complete" in done.stdout
    complete = get_completion_class(shell)
    assert complete is not None
    offered = complete(cli, {}, "expo", "_EXPO_COMPLETE").get_completions
    assert {item.value for item in offered([], "")} == set(cli.commands)
    assert {item.value for item in offered(["extrapolate"], "--pa")} == {"--paper-alpha"}
