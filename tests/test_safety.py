"""Kill it, interrupt it, run it twice, fill its disk: nothing half-written is ever visible."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import expo as door
from expo import disk
from expo.compute.stream import Tuning
from expo.output.journal import Journal
from expo.planning.build import build_plan
from expo.spec.request import make_request

from .conftest import Pair, Ran, nudged, run_plan
from .test_merge import digest

STAGING = ".out.expo-staging"

_RUN = """
import sys
from pathlib import Path
from expo.cli import entry
from expo.verbs import running
original = running.run_plans  # the command line itself, with small chunks to make it slow
def slow(*args, tuning, **more):
    tuning = running.Tuning(threads=2, chunk_bytes=4096, block_elements=2048)
    return original(*args, tuning=tuning, **more)
running.run_plans = slow
entry.run()
"""


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A pair of 12 MB in 24 shards: about a second of work in small chunks."""
    generator = torch.Generator().manual_seed(0)
    for side in ("sft", "aligned"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "config.json").write_text("{}")
    for number in range(24):
        tensors = {f"w{number}": (torch.randn(250, 1000, generator=generator) * 0.02).bfloat16()}
        name = f"model-{number + 1:05d}-of-00024.safetensors"
        save_file(tensors, tmp_path / "sft" / name)
        save_file(nudged(tensors, number), tmp_path / "aligned" / name)
    for side in ("sft", "aligned"):
        weight_map = {f"w{n}": f"model-{n + 1:05d}-of-00024.safetensors" for n in range(24)}
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / side / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RUN, "extrapolate", "sft", "aligned", "out"]
    flags = ("--alpha", "1.3", "--no-verify", *flags)  # made-up tensors, no model has these shapes
    return subprocess.Popen(
        [*command, *flags], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def third_shard(folder: Path) -> Callable[[], bool]:
    return (folder / STAGING / "model-00003-of-00024.safetensors").exists


def reference(folder: Path, *flags: str) -> dict[str, str]:
    """The files of an undisturbed run."""
    process = start(folder, *flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    files = digest(folder / "out")
    shutil.rmtree(folder / "out")
    return files


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    expected = reference(folder, "--rounding", "stochastic")
    chance = random.Random(seed)
    killed = resumed = 0
    for _ in range(kills):
        journal = folder / STAGING / "journal.jsonl"
        before = journal.stat().st_size if journal.exists() else 0
        process = start(folder, "--rounding", "stochastic")
        if wait_for(lambda: journal.exists() and journal.stat().st_size > before, process):  # noqa: B023
            time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        killed += process.returncode == -signal.SIGKILL
        resumed += "resuming" in err
        if (folder / "out").exists():  # it was quicker than the kill: the model is whole
            assert digest(folder / "out") == expected
            shutil.rmtree(folder / "out")
    process = start(folder, "--rounding", "stochastic")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert digest(folder / "out") == expected  # manifest, statistics and card included
    assert sorted(p.name for p in folder.iterdir()) == ["aligned", "out", "sft"]
    assert killed > 0
    assert resumed > 0


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(big: Path) -> None:
    kill_and_resume(big, kills=4, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_gives_the_same_bytes(big: Path) -> None:
    kill_and_resume(big, kills=20, seed=1)


@pytest.mark.parametrize(
    ("signal_", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted_says_how_to_resume_and_does(
    big: Path, signal_: int, code: int, word: str
) -> None:
    process = start(big)
    assert wait_for(third_shard(big), process)
    process.send_signal(signal_)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.strip().endswith(
        f"expo: {word}; what is finished is kept, run the same command again to resume"
    )
    assert "Traceback" not in err
    assert out == ""
    assert not (big / "out").exists()
    again = start(big)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "resuming: " in err
    assert "of 24 shards done" in err


def test_another_request_starts_afresh_and_says_why(big: Path) -> None:
    process = start(big)
    assert wait_for(third_shard(big), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    again = start(big, "--seed", "9", "--rounding", "stochastic")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "an unfinished run was for another plan (rounding, seed changed): starting afresh" in err


def test_a_changed_input_starts_afresh(big: Path) -> None:
    process = start(big)
    assert wait_for(third_shard(big), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    os.utime(big / "sft" / "model-00001-of-00024.safetensors", ns=(1, 1))
    again = start(big)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "(sft sft/model-00001-of-00024.safetensors changed)" in err


def test_two_runs_on_one_out(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    staging = tmp_path / STAGING
    staging.mkdir()
    fd = disk.hold(staging, fcntl.LOCK_EX)
    assert fd is not None
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    assert ran.code == 1
    assert ran.err == f"expo: another run is writing {tmp_path / 'out'}: wait for it\n"
    os.close(fd)
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    assert ran.code == 0


def test_concurrent_runs_one_wins_and_nothing_is_torn(pair: Pair, tmp_path: Path) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(run_plan(plan, tmp_path / "out"))
        except door.OutputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [o for o in outcomes if not isinstance(o, str)]
    assert len(won) == 1, outcomes
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    hashes = {n: h for n, h in digest(tmp_path / "out").items() if n != "expo.json"}
    assert hashes == manifest["files"] | manifest["beside"]
    assert not (tmp_path / STAGING).exists()


def test_out_that_is_taken_after_the_check_is_not_overwritten(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expo.verbs import running

    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))

    def fetch_while_another_run_ends(_plan: object) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr(running, "fetch", fetch_while_another_run_ends)
    with pytest.raises(door.OutputError, match="exists and is not empty"):
        run_plan(plan, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]
    assert not (tmp_path / STAGING).exists()


def test_a_torn_journal_line_costs_one_shard(tmp_path: Path, pair: Pair) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    calls: list[Path] = []
    tuning = Tuning(threads=1, chunk_bytes=64, block_elements=8)
    wanted = 2

    def interrupt(done: int, _total: int) -> None:
        journal = tmp_path / STAGING / "journal.jsonl"
        if done and journal.exists() and journal.read_text().count("\n") >= wanted:
            calls.append(journal)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(
            plan,
            tmp_path / "out",
            tuning=tuning,
            progress=interrupt,
        )
    lines = calls[0].read_text().splitlines(keepends=True)
    calls[0].write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    known = Journal(calls[0]).read()
    assert known is not None
    assert len(known[1]) == len(lines) - 2
    wanted = len(lines)
    with pytest.raises(KeyboardInterrupt):  # what is appended after the torn line must be readable
        run_plan(plan, tmp_path / "out", tuning=tuning, progress=interrupt)
    known = Journal(calls[0]).read()
    assert known is not None
    assert len(known[1]) >= len(lines) - 1
    run_plan(plan, tmp_path / "out", tuning=tuning)
    run_plan(plan, tmp_path / "fresh", tuning=tuning)
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_killed_before_the_rename_is_placed_by_the_next_run(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expo.output.staging import Staging

    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "place", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tmp_path / "out")
    assert (tmp_path / STAGING / "expo.json").exists()
    (tmp_path / STAGING / "journal.jsonl").unlink()  # the last thing before the rename
    seen: list[tuple[int, int]] = []
    run_plan(plan, tmp_path / "out", progress=lambda *a: seen.append(a))
    assert seen == []  # nothing was computed again
    assert (tmp_path / "out" / "expo.json").exists()
    assert not (tmp_path / STAGING).exists()


def test_killed_while_filling_an_empty_out(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    out = tmp_path / "out"
    out.mkdir()
    rename = disk.rename
    moved: list[str] = []

    def stop_half_way(path: Path, target: Path) -> None:
        if target.parent == out and path.parent.name == ".expo-new":
            if len(moved) == 2:
                raise KeyboardInterrupt
            moved.append(path.name)
        rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "rename", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, out)
    assert "config.json" not in {p.name for p in out.iterdir()}  # no loader takes it for a model
    shown = expo("plan", pair.sft, pair.aligned, "--alpha", 1.5, "--out", out)
    assert f"{out} is half placed: whatever reads or writes it next finishes that" in shown.out
    shutil.copytree(out, tmp_path / "read")
    run_plan(plan, tmp_path / "fresh")
    assert door.info(tmp_path / "read").to_json() == (tmp_path / "fresh/expo.json").read_text()
    assert digest(tmp_path / "read") == digest(tmp_path / "fresh")
    seen: list[tuple[int, int]] = []
    run_plan(plan, out, progress=lambda *a: seen.append(a))
    assert seen == []  # nothing was computed again
    assert digest(out) == digest(tmp_path / "fresh")
    with pytest.raises(door.OutputError, match="exists and is not empty"):
        run_plan(plan, out)


def test_too_little_space_is_said_before(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    assert ran.code == 1
    assert " are needed, 100 bytes are free; make room, or name an OUT on another disk" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "sft"]


def test_a_disk_that_fills_up_under_way_is_survived(big: Path) -> None:
    """A real, small filesystem, which something else fills while expo writes."""
    script = f"""
mkdir -p mount && mount -t tmpfs -o size=24m none mount || exit 77
({sys.executable} -c 'import sys; exec(sys.argv.pop(1))' "$0" extrapolate sft aligned mount/out --alpha 1.3 -q; echo "code $?") 2>&1 &
while [ ! -e mount/{STAGING}/model-00002-of-00024.safetensors ]; do sleep 0.005; done
dd if=/dev/zero of=mount/ballast bs=64k 2>/dev/null
wait
ls -A mount
rm mount/ballast
{sys.executable} -m expo extrapolate sft aligned mount/out --alpha 1.3 2>&1 | head -2
ls -A mount
"""
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script, _RUN],
        cwd=big, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a small filesystem")
    lines = done.stdout.splitlines()
    assert "is full: finished shards are kept, make room and run the same command again" in lines[0]
    assert lines[1] == "code 1"
    assert sorted(lines[2:4]) == [STAGING, "ballast"]
    assert any(line.startswith("resuming: ") for line in lines[4:])
    assert lines[-1] == "out"
