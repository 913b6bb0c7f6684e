"""The command line's manners: help, JSON, streams, imports."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import expo as door
from expo.cli.main import cli
from expo.cli.output import Output, gigabytes, table

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
    assert len(ran.out.splitlines()) == 1
    assert ran.out.startswith("asked alpha 1.5 (paper alpha 0.5); effective alpha 1.")
    assert "stochastic rounding would give about" in ran.out


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


def test_a_closed_pipe_is_no_traceback(pair: Pair) -> None:
    command = f"{sys.executable} -m expo plan {pair.sft} {pair.aligned} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_no_colour_and_no_bar_off_a_terminal(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "o", "--alpha", 1.5)
    assert "\x1b" not in ran.out + ran.err
    assert "\r" not in ran.err


def test_log_lines_come_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Output().progress("out") as update:
        for done in (1, 2, 3, 4):
            update(done * 10**9, 8 * 10**9)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "out: 2.00 GB of 8.00 GB, 0.10 GB/s, 60 s left",
        "out: 4.00 GB of 8.00 GB, 0.10 GB/s, 40 s left",
    ]


def test_small_words() -> None:
    assert gigabytes(14_480_000_000) == "14.48 GB"
    assert gigabytes(1_500_000) == "1.50 MB"
    assert table(("a", "b"), [("x", "10"), ("yy", "2")]) == "a    b\nx   10\nyy   2"


def test_the_public_door_is_explicit_sorted_and_small() -> None:
    assert door.__all__ == sorted(door.__all__)
    assert len(door.__all__) <= 30
    for name in door.__all__:
        assert getattr(door, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        door.nothing  # noqa: B018
