"""Several processes, one OUT: the bytes of one process, whoever dies, and one of them places it."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import expo as door
from expo import disk
from expo.checkpoint.files import open_directory
from expo.compute.stream import Tuning
from expo.distribution import shared, working
from expo.distribution.share import Share, read_share
from expo.errors import BusyError, CheckpointError, OutputError, SpecError
from expo.output.journal import fingerprint, identities
from expo.output.staging import Staging
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.results import MergeResult, WorkerResult
from expo.spec.request import make_request
from expo.verbs import join
from expo.verbs.join import join_plans
from expo.verbs.several import plans_at

from .conftest import Pair, Ran, nudged, run_plan, write_checkpoint
from .test_merge import digest
from .test_safety import wait_for

STAGING = ".out.expo-staging"
SHARDS = 12
SMALL = Tuning(threads=1, chunk_bytes=1 << 16, block_elements=2048)

_RUN = """
import sys
from expo.cli import entry
from expo.verbs import join
original = join.join_plans  # the command line itself, with small chunks to make it slow
def slow(*args, tuning, **more):
    return original(*args, tuning=join.Tuning(threads=1, chunk_bytes=4096, block_elements=2048), **more)
join.join_plans = slow
entry.run()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of 6 MB in 12 shards: half a second of work in small chunks; and what one process makes of it."""
    place = tmp_path_factory.mktemp("models")
    tensors = {f"w{n}": torch.randn(250, 1000, generator=torch.Generator().manual_seed(n)).bfloat16()
               for n in range(SHARDS)}  # fmt: skip
    write_checkpoint(place / "sft", tensors, shards=SHARDS)
    write_checkpoint(place / "aligned", nudged(tensors), shards=SHARDS)
    run_plan(plan_of(place), place / "alone", tuning=SMALL)
    return place


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    for side in ("sft", "aligned"):
        (tmp_path / side).symlink_to(models / side)
    return tmp_path


def start(place: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RUN, "extrapolate", "sft", "aligned", "out", "--alpha", "1.3"]
    return subprocess.Popen(
        [*command, "--no-verify", *flags],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(place: Path) -> int:
    return len(list((place / STAGING).glob("*.safetensors")))


def is_as_alone(place: Path, models: Path) -> bool:
    """Manifest, statistics and card included; and nothing is left beside it."""
    assert sorted(p.name for p in place.iterdir()) == ["aligned", "out", "sft"]
    assert digest(place / "out") == digest(models / "alone")
    return True


def plan_of(place: Path, alpha: float = 1.3) -> Plan:
    return build_plan(make_request(str(place / "sft"), str(place / "aligned"), alpha=alpha))


def share(
    place: Path, index: int, count: int, say: Callable[[str], None] | None = None
) -> MergeResult | WorkerResult:
    plan, worker = plan_of(place), Share(index, count)
    done = join_plans([plan], [place / "out"], share=worker, tuning=SMALL, say=say)
    return done if isinstance(done, WorkerResult) else done[0]


# By locks


@pytest.mark.slow
def test_three_processes_make_what_one_makes(place: Path, models: Path) -> None:
    processes = [start(place, "--join", "--json") for _ in range(3)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert is_as_alone(place, models)
    results = [json.loads(out) for out, _ in said]
    for result in results:
        assert result["statistics"] == results[0]["statistics"]


def test_each_shard_is_computed_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    record = shared.SharedStaging.record

    def counted(self: shared.SharedStaging, shard: shared.FinishedShard) -> None:
        computed.append(shard.file)
        record(self, shard)

    monkeypatch.setattr(shared.SharedStaging, "record", counted)
    monkeypatch.setattr(join, "_POLL_SECONDS", 0.02)
    failures = _in_threads(lambda: join_plans([plan_of(place)], [place / "out"], tuning=SMALL), 4)
    assert failures == []
    assert len(computed) == len(set(computed)) == SHARDS


def _in_threads(work: Callable[[], object], count: int) -> list[BaseException]:
    """What has failed of as many processes, which threads stand for: their locks are as apart."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.slow
def test_what_a_dead_process_was_at_is_done_by_the_others(place: Path, models: Path) -> None:
    processes = [start(place, "--join") for _ in range(2)]
    assert wait_for(lambda: finished(place) >= 2, processes[0])
    processes[0].kill()
    _, err = processes[1].communicate(timeout=120)
    processes[0].communicate()
    assert processes[1].returncode == 0, err
    assert is_as_alone(place, models)


@pytest.mark.slow
def test_killed_at_random_and_run_again_they_give_the_same_bytes(place: Path, models: Path) -> None:
    chance, killed = random.Random(0), 0
    for _ in range(8):
        processes = [start(place, "--join") for _ in range(3)]
        before = finished(place)
        wait_for(lambda: finished(place) > before, processes[0])  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.15))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
        if (place / "out").exists():
            assert is_as_alone(place, models)
            shutil.rmtree(place / "out")
    processes = [start(place, "--join") for _ in range(3)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert is_as_alone(place, models)
    assert killed > 8


@pytest.mark.slow
def test_one_process_goes_on_where_several_were_killed(place: Path, models: Path) -> None:
    processes = [start(place, "--join") for _ in range(2)]
    assert wait_for(lambda: finished(place) >= 3, processes[0])
    for process in processes:
        process.kill()
        process.communicate()
    told: list[str] = []
    run_plan(plan_of(place), place / "out", tuning=SMALL, say=told.append)
    assert any(text.startswith("resuming: ") for text in told)
    assert is_as_alone(place, models)


def test_who_comes_late_finds_it_done(place: Path, models: Path) -> None:
    (first,) = _joined(place)
    (late,) = _joined(place)
    assert late.statistics == first.statistics
    assert is_as_alone(place, models)


def test_who_waits_to_enter_while_it_is_placed_leaves_nothing(place: Path, models: Path) -> None:
    plan = plan_of(place)
    with Staging(place / "out") as alone:
        waiting = threading.Thread(target=_joined, args=(place,))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
        shutil.copytree(models / "alone", alone.folder, dirs_exist_ok=True)
        print_ = fingerprint(plan, identities(plan))
        manifest = alone.complete_manifest(print_)
        assert manifest is not None
        alone.commit(manifest)
    waiting.join()
    assert is_as_alone(place, models)


def test_the_old_model_goes_though_who_replaced_it_was_killed(place: Path, models: Path) -> None:
    _joined(place)
    shutil.copytree(models / "aligned", place / STAGING)  # an exchange has put it there
    _joined(place)
    assert is_as_alone(place, models)


@pytest.mark.parametrize("before", ["nothing", "an empty directory", "another model"])
def test_five_at_once(
    before: str, place: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(working, "_POLL_SECONDS", 0.01)
    if before == "an empty directory":
        (place / "out").mkdir()
    if before == "another model":
        run_plan(plan_of(place, 1.1), place / "out", tuning=SMALL)
    plan, overwrite = plan_of(place), before == "another model"
    work = partial(join_plans, [plan], [place / "out"], tuning=SMALL, overwrite=overwrite)
    assert _in_threads(work, 5) == []
    assert is_as_alone(place, models)


def _joined(place: Path, *, overwrite: bool = False) -> tuple[MergeResult, ...]:
    done = join_plans([plan_of(place)], [place / "out"], overwrite=overwrite, tuning=SMALL)
    assert isinstance(done, tuple)
    return done


def test_several_alphas(place: Path) -> None:
    alphas = (1.1, 1.3)
    plan, outs = plan_of(place), [place / f"out-{alpha}" for alpha in alphas]
    plans = [plan.at(alpha) for alpha in alphas]
    for alpha in alphas:
        run_plan(plan_of(place, alpha), place / f"alone-{alpha}", tuning=SMALL)
    assert _in_threads(lambda: join_plans(plans, outs, tuning=SMALL), 2) == []
    for alpha, out in zip(alphas, outs, strict=True):
        assert digest(out) == digest(place / f"alone-{alpha}")


def test_the_python_door(place: Path, models: Path) -> None:
    result = door.extrapolate(
        place / "sft", place / "aligned", place / "out", alpha=1.3, join=True, verify=False
    )
    assert result.out == place / "out"
    with pytest.raises(SpecError, match="several documents"):
        door.merge(_two_documents(place), place / "other", join=True)


def test_another_plan_is_refused(place: Path, expo: Callable[..., Ran]) -> None:
    with shared.SharedStaging(place / "out") as other:
        plan = plan_of(place, 1.2)
        other.enter(fingerprint(plan, identities(plan)))
    ran = _run(expo, place, "--join")
    assert ran.code == 1
    assert ran.err == (
        f"expo: {place / STAGING} holds the work of another plan (alpha or other numbers changed): give all workers the same command "
        "and inputs; remove the directory if that plan is given up\n"
    )
    assert (place / STAGING).is_dir()


def test_a_damaged_input_is_said_by_all_and_nothing_is_left(tmp_path: Path) -> None:
    tensors = {f"w{n}": torch.ones(4, 4) for n in range(3)}
    write_checkpoint(tmp_path / "sft", tensors, shards=3)
    write_checkpoint(
        tmp_path / "aligned", tensors | {"w1": torch.full((4, 4), torch.nan)}, shards=3
    )
    failures = _in_threads(lambda: join_plans([plan_of(tmp_path)], [tmp_path / "out"]), 2)
    assert [type(failure) for failure in failures] == [CheckpointError, CheckpointError]
    assert all("w1 holds NaN or Inf" in str(failure) for failure in failures)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "sft"]


def test_who_was_to_place_it_gave_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "_GONE_SECONDS", 0.05)
    monkeypatch.setattr(join, "_POLL_SECONDS", 0.02)

    def gives_up(plans: object, outs: list[Path], **_: object) -> None:
        with Staging(outs[0]) as staging:
            staging.discard()

    monkeypatch.setattr(join, "run_plans", gives_up)
    parts = join._parts([plan_of(place)], [place / "out"], "cpu", hash_inputs=False)
    with pytest.raises(OutputError, match="was given up by the worker that was to place it"):
        join._place_in_turn(parts, shared.placing, lambda *_: None, print)


def test_a_disk_that_is_too_full_for_what_nobody_has_begun(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Staging, "free_bytes", lambda self: 1000)
    with pytest.raises(OutputError, match=r"is too full: .* are needed, .* are free"):
        _joined(place)


def _no_locks(fd: int, how: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def _locks_of_files_only(fd: int, how: int, flock=fcntl.flock) -> None:
    """As on NFS and Lustre, where a lock on a directory holds on one machine: this one."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        flock(fd, how)


def test_locks_are_of_files(place: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _locks_of_files_only)
    plan = plan_of(place)
    with shared.SharedStaging(place / "out") as sink:
        sink.enter(fingerprint(plan, identities(plan)))
        with pytest.raises(BusyError, match="another run is writing"):
            Staging(place / "out")
    with Staging(place / "out"), pytest.raises(BusyError), disk.locked(place / STAGING, place):
        pass
    _joined(place)
    with (
        disk.locked(place / "out", place),
        pytest.raises(BusyError),
        disk.locked(place / "out", place),
    ):
        pass
    assert is_as_alone(place, models)


def test_a_link_in_the_place_of_a_lock(place: Path) -> None:
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (place / STAGING).mkdir(0o700)
    for target in (elsewhere, place / "nowhere"):
        link = place / STAGING / disk.CLAIMS
        link.symlink_to(target)
        with pytest.raises(OutputError, match="cannot be created or locked: Not a directory"):
            Staging(place / "out")
        link.unlink()
    (place / STAGING / disk.CLAIMS).mkdir()
    (place / STAGING / disk.CLAIMS / "hold").symlink_to(elsewhere / "file")
    with pytest.raises(OutputError, match="cannot be created or locked"):
        Staging(place / "out")
    assert not list(elsewhere.iterdir())


def test_a_placed_directory_that_shows_late(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _joined(place)
    parts = join._parts([plan_of(place)], [place / "out"], "cpu", hash_inputs=False)
    states = [parts, parts, []]
    monkeypatch.setattr(join, "_left", lambda parts: states.pop(0))
    monkeypatch.setattr(join, "_POLL_SECONDS", 0.01)
    with join._faults(parts, removes=True):
        raise FileNotFoundError(errno.ENOENT, "claims/3")
    assert not states


def test_a_run_by_itself_removes_what_dead_workers_were_at(place: Path) -> None:
    plan = plan_of(place)
    print_ = fingerprint(plan, identities(plan))
    with shared.SharedStaging(place / "out") as sink:
        sink.enter(print_)
        sink.open(plan.shards[0]).close()
    with Staging(place / "out") as staging:
        assert staging.resume(print_) == ([], None)
    assert not list(place.glob(f"{STAGING}/**/*.partial"))


def test_several_outputs_need_room_together(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(place)
    alphas = (1.2, 1.3)
    plans, outs = plans_at(plan.request, alphas, place / "out", interpolate=False)
    monkeypatch.setattr(Staging, "free_bytes", lambda self: plan.held_on_disk() * 3 // 2)
    with pytest.raises(OutputError, match="is too full"):
        join_plans(plans, outs, tuning=SMALL)


def test_a_disk_without_locks_is_told_from_others(
    place: Path, expo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    ran = _run(expo, place, "--join")
    assert ran.code == 1
    assert ran.err == (
        f"expo: {place / STAGING} cannot be created or locked: No locks available; its filesystem has no locks: "
        "--worker 0/1 does without\n"
    )
    ran = _run(expo, place, "--worker", "0/1")
    assert ran.code == 0, ran.err


# Divided beforehand


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_of_the_shares_places(
    order: tuple[int, ...], place: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    *before, last = order
    for number, index in enumerate(before, 1):
        result = share(place, index, 3)
        assert result == WorkerResult((place / "out",), f"{index}/3", SHARDS, SHARDS - 4 * number)
    assert isinstance(share(place, last, 3), MergeResult)
    assert is_as_alone(place, models)
    assert isinstance(share(place, 0, 3), MergeResult)  # run again, it finds OUT


def test_more_shares_than_shards(tmp_path: Path, pair: Pair) -> None:
    results = [share(tmp_path, index, 5) for index in (4, 3, 0, 1, 2)]
    assert [isinstance(result, MergeResult) for result in results] == [False] * 4 + [True]


def test_two_processes_of_one_share_do_no_harm(place: Path, models: Path) -> None:
    share(place, 1, 2)
    failures = _in_threads(lambda: share(place, 0, 2), 3)
    assert all(isinstance(failure, OutputError) for failure in failures)  # one was placing it
    assert is_as_alone(place, models)


def _asked_first(place: Path, share_: str, age: float) -> None:
    """As if a share had placed OUT next, and had given no sign of life for so many seconds."""
    folder = place / STAGING
    with shared.Turns(share_).turn(folder) as is_mine:
        assert is_mine
    path = folder / disk.CLAIMS / "placer"
    assert path.read_text() == share_
    then = time.time() - age
    os.utime(path, (then, then))


@pytest.mark.parametrize("name", ["1/2", "2/3"])
def test_who_was_to_place_it_is_dead(name: str, place: Path, models: Path) -> None:
    """Run again under its own name or another: a smaller array takes over."""
    assert isinstance(share(place, 1, 2), WorkerResult)
    _asked_first(place, name, age=1000)
    assert isinstance(share(place, 0, 2), MergeResult)
    assert is_as_alone(place, models)


def test_who_is_to_place_it_is_waited_for(
    place: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_BEAT_SECONDS", 0.05)
    assert isinstance(share(place, 1, 2), WorkerResult)
    _asked_first(place, "1/2", age=0)
    remarks: list[str] = []

    def place_it(remark: str) -> None:
        remarks.append(remark)
        assert isinstance(share(place, 1, 2), MergeResult)

    assert isinstance(share(place, 0, 2, say=place_it), MergeResult)
    assert remarks == ["another worker verifies and places out"]
    assert is_as_alone(place, models)


def test_signs_of_life(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_BEAT_SECONDS", 0.01)
    folder = place / STAGING
    folder.mkdir()
    path = folder / disk.CLAIMS / "placer"
    with shared.Turns("0/2").turn(folder):
        os.utime(path, (1, 1))
        assert _soon(lambda: path.stat().st_mtime > 1)
        other = shared.Turns("1/2")
        with other.turn(folder) as is_mine:
            assert not is_mine
    os.utime(path, (1, 1))
    with other.turn(folder) as is_mine:  # it asks now and then only
        assert not is_mine or path.read_text() == "1/2"
    assert [entry.name for entry in path.parent.iterdir() if len(entry.name) == 16] == []


def _soon(holds: Callable[[], bool]) -> bool:
    return any(holds() or time.sleep(0.01) for _ in range(3000))


def test_by_locks_first_and_then_by_shares(place: Path, models: Path) -> None:
    """A run with --join was killed: a lock on a file says nothing of shares."""
    with shared.SharedStaging(place / "out") as sink:
        sink.enter(fingerprint(plan_of(place), identities(plan_of(place))))
    assert isinstance(share(place, 0, 1), MergeResult)
    assert is_as_alone(place, models)


@pytest.mark.parametrize("goes_on", [
    lambda place: _joined(place),
    lambda place: share(place, 0, 1),
    lambda place: run_plan(plan_of(place), place / "out", tuning=SMALL),
])  # fmt: skip
@pytest.mark.parametrize("by", ["itself", "locks", "a share"])
def test_what_a_killed_run_was_at_is_not_placed(
    by: str, goes_on: Callable[[Path], object], place: Path, models: Path
) -> None:
    plan = plan_of(place)
    print_ = fingerprint(plan, identities(plan))
    if by == "itself":
        with Staging(place / "out") as staging:
            staging.start_afresh(print_)
            staging.open(plan.shards[3]).close()
    else:
        worker = None if by == "locks" else "1-of-2"
        with shared.SharedStaging(place / "out", worker=worker) as sink:
            sink.enter(print_)
            sink.open(plan.shards[3]).close()
    goes_on(place)
    assert is_as_alone(place, models)


def test_a_worker_that_comes_when_it_is_placed_leaves_nothing(
    place: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(place)
    share(place, 1, 2)
    open_up = disk.open_up

    def come_late(folder: Path) -> None:
        late = shared.SharedStaging(place / "out", worker="1-of-2")
        late.enter(fingerprint(plan, identities(plan)))
        open_up(folder)

    monkeypatch.setattr(disk, "open_up", come_late)  # when the directories of workers are gone
    share(place, 0, 2)
    assert is_as_alone(place, models)


def test_who_looks_at_an_output_does_not_see_locks_come_and_go(place: Path) -> None:
    _joined(place)
    for name in (disk.CLAIMS, ".expo-work-any-1"):
        (place / "out" / name).mkdir()
        (place / "out" / name / "hold").touch()
    with disk.locked(place / "out", place / "out"):  # so nobody sweeps them
        assert not [name for name in open_directory(place / "out").sizes if ".expo-" in name]


def test_a_shard_that_gets_its_name_between_two_looks(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared.SharedStaging(place / "out") as sink:
        monkeypatch.setattr(Path, "glob", lambda *_: iter([place / "gone"]))
        assert sink.begun_bytes() == 0


def test_who_places_waits_for_who_sweeps(place: Path, models: Path) -> None:
    run_plan(plan_of(place, 1.1), place / "out", tuning=SMALL)
    with disk.locked(place / "out", place / "out"):
        failures: list[BaseException | None] = []
        placing = threading.Thread(
            target=lambda: failures.append(_failure(partial(_joined, place, overwrite=True)))
        )
        placing.start()
        assert _soon(lambda: (place / STAGING / "expo.json").exists())
        time.sleep(0.1)
        assert placing.is_alive()
    placing.join()
    assert failures == [None]
    assert is_as_alone(place, models)


def _failure(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except OutputError as error:
        return error
    return None


def test_a_damaged_output_is_not_done(place: Path, models: Path) -> None:
    _joined(place)
    (place / "out" / plan_of(place).shards[2].file).unlink()
    with pytest.raises(OutputError, match="exists and is not empty"):
        _joined(place)
    _joined(place, overwrite=True)
    assert is_as_alone(place, models)


def test_a_full_disk_leaves_no_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "free_bytes", lambda self: 1000)
    with pytest.raises(OutputError, match="is too full"):
        _joined(place)
    assert not (place / STAGING).exists()


@pytest.mark.slow
def test_shares_are_killed_and_run_again(place: Path, models: Path) -> None:
    first = start(place, "--worker", "0/2")
    assert wait_for(lambda: finished(place) >= 1, first)
    first.kill()
    first.communicate()
    second = start(place, "--worker", "1/2", "--json")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    told = json.loads(out)
    assert told["worker"] == "1/2"
    assert 0 < told["missing"] < SHARDS / 2
    again = start(place, "--worker", "0/2")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.startswith("asked  ExPO")
    assert is_as_alone(place, models)


def test_what_dead_processes_were_at_takes_no_room(place: Path) -> None:
    plan = plan_of(place)
    print_ = fingerprint(plan, identities(plan))
    for worker in (None, "0-of-2"):
        with shared.SharedStaging(place / "out", worker=worker) as sink:
            sink.enter(print_)
            sink.open(plan.shards[0]).close()
            assert sink.begun_bytes() >= plan.shards[0].file_bytes
        with shared.SharedStaging(place / "out", worker=worker) as sink:
            sink.enter(print_)
            assert sink.begun_bytes() == 0


def test_a_living_process_keeps_what_it_is_at(place: Path) -> None:
    plan = plan_of(place)
    print_ = fingerprint(plan, identities(plan))
    with shared.SharedStaging(place / "out") as sink, shared.SharedStaging(place / "out") as other:
        sink.enter(print_)
        assert sink.claim(0, plan.shards[0])
        sink.open(plan.shards[0]).close()
        other.enter(print_)
        assert sink.begun_bytes() >= plan.shards[0].file_bytes
        assert not other.claim(0, plan.shards[0])
        assert other.claim(1, plan.shards[1])


def test_who_is_late_by_a_share_finds_the_directory_gone(place: Path, models: Path) -> None:
    plan = plan_of(place)
    with shared.SharedStaging(place / "out", worker="0-of-2") as late:
        late.enter(fingerprint(plan, identities(plan)))
        for index in (0, 1):
            share(place, index, 2)
        with pytest.raises(FileNotFoundError):
            late.open(plan.shards[0])
    assert is_as_alone(place, models)


# The command line


def test_a_worker_says_what_it_leaves(place: Path, expo: Callable[..., Ran]) -> None:
    ran = _run(expo, place, "--worker", "0/2")
    assert ran.out == (
        f"worker 0/2: its part of {place / 'out'} is done; 6 of 12 shards are still to come from others, and the "
        "last of them places it\n"
    )


@pytest.mark.parametrize(("flags", "words"), [
    (("--join", "--worker", "0/2"), "give --join, --worker or --engine, one of them: the work is shared by locks, beforehand, or by Ray"),
    (("--worker", "2/2"), "worker 2/2: of 2 workers the numbers are 0 … 1"),
    (("--worker", "1"), "worker '1': say I/N, like 0/8 … 7/8, or auto, or auto/8"),
    (("--worker", "auto"), "nothing here says which worker this is: auto knows a SLURM array or step"),
    (("--join", "--push"), "--join: not with --push, which sends shards as one process finishes them"),
    (("--join", "--as-adapter"), "--join: not with --as-adapter, which writes megabytes"),
])  # fmt: skip
def test_what_does_not_go_together(
    flags: tuple[str, ...],
    words: str,
    place: Path,
    expo: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    ran = _run(expo, place, *flags)
    assert ran.code == 2
    assert words in ran.err
    assert sorted(p.name for p in place.iterdir()) == ["aligned", "sft"]


def test_several_documents_are_not_shared(place: Path, expo: Callable[..., Ran]) -> None:
    ran = expo("merge", _two_documents(place), place / "out", "--join")
    assert ran.code == 2
    assert ran.err == (
        "expo: --join: not with a spec of several documents, which are made one after the other\n"
    )


def _two_documents(place: Path) -> Path:
    spec = f"models: [{{model: {place}/sft}}, {{model: {place}/aligned}}]\nmerge_method: linear\nparameters: {{weight: 1.0}}\n"
    (place / "two.yml").write_text(f"name: a\n{spec}---\n{spec}")
    return place / "two.yml"


def _run(expo: Callable[..., Ran], place: Path, *flags: str) -> Ran:
    return expo(
        "extrapolate", place / "sft", place / "aligned", place / "out", "--alpha", 1.3, "-q", *flags
    )


SLURM = {"SLURM_ARRAY_TASK_ID": "17", "SLURM_ARRAY_TASK_MIN": "11", "SLURM_ARRAY_TASK_COUNT": "5"}


@pytest.mark.parametrize(("text", "environment", "expected"), [
    ("3/8", {}, "3/8"),
    ("auto", {"RANK": "2", "WORLD_SIZE": "4"}, "2/4"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "3"}, "2/5"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_STEP": ""}, "0/5"),
    # a batch script has these of its job, and is one process all the same
    ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "2/5"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "3", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "5/10"),
    ("auto", {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "1/2"),
    ("auto", SLURM | {"RANK": "2", "WORLD_SIZE": "4"}, "2/4"),
    ("auto/6", {"JOB_COMPLETION_INDEX": "5"}, "5/6"),
])  # fmt: skip
def test_the_share_that_a_scheduler_gives(
    text: str, environment: dict[str, str], expected: str
) -> None:
    assert str(read_share(text, environment)) == expected


@pytest.mark.parametrize(("text", "environment", "words"), [
    ("auto", {"JOB_COMPLETION_INDEX": "5"}, "Kubernetes gives an index and no count: say auto/N"),
    ("auto/5", {"JOB_COMPLETION_INDEX": "5"}, "worker 5/5: of 5 workers the numbers are 0 … 4"),
    ("auto", {"RANK": "x", "WORLD_SIZE": "4"}, "RANK is 'x', which is no number"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_ID": "16"}, "the array's numbers are not evenly spaced, so task 16 cannot tell which of 5 it is: give an array like 0-4"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "5"}, "not evenly spaced"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "x"}, "SLURM_ARRAY_TASK_STEP is 'x', which is no number"),
    ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
    ("0/0", {}, "worker 0/0: there has to be one worker at least"),
    ("auto/0", {}, "worker 'auto/0': say auto, or auto/8"),
    ("auto/", {"RANK": "0", "WORLD_SIZE": "4"}, "say auto, or auto/8 for one of 8"),
    ("-1/4", {}, "say I/N"),
    ("1/2/3", {}, "say I/N"),
    ("٣/8", {}, "say I/N"),
])  # fmt: skip
def test_a_share_that_is_none(text: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_share(text, environment)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_there_is_and_apart(count: int) -> None:
    shares = [set(filter(Share(index, count).has, range(20))) for index in range(count)]
    assert set().union(*shares) == set(range(20))
    assert sum(map(len, shares)) == 20
