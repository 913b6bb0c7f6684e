"""Models of many files, and few open files allowed: no more are open than there is room for."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import expo as door
from expo.checkpoint import reader
from expo.checkpoint.reader import FileReader, read_buffer
from expo.compute.stream import Tuning
from expo.planning.build import build_plan
from expo.spec.request import make_request

from .conftest import Pair, extrapolate, nudged, run_plan, write_checkpoint
from .test_merge import digest

_FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import expo
expo.extrapolate("sft", "aligned", "few", alpha=1.5, verify=False)
"""


@pytest.mark.parametrize("shards", [40, pytest.param(191, marks=pytest.mark.slow)])
def test_many_shards_a_side_are_merged_with_64_open_files(shards: int, tmp_path: Path) -> None:
    tensors = {f"w{n}": torch.full((8,), n, dtype=torch.bfloat16) for n in range(shards)}
    write_checkpoint(tmp_path / "sft", tensors, shards=shards)
    write_checkpoint(tmp_path / "aligned", nudged(tensors), shards=shards)
    command = [sys.executable, "-c", _FEW]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "many", alpha=1.5)
    assert digest(tmp_path / "few") == digest(tmp_path / "many")


def test_a_file_that_has_to_be_opened_again_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_OPEN", reader._OpenFiles(1))
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    first, second = FileReader(tmp_path / "a", "a"), FileReader(tmp_path / "b", "b")
    target = read_buffer(10)[:10]
    first.copy(0, target)
    assert target.tobytes() == b"a" * 10
    (tmp_path / "new").write_bytes(b"n" * 100)
    (tmp_path / "new").replace(tmp_path / "b")
    with pytest.raises(door.CheckpointError, match="b changed while it was read: run again"):
        second.copy(0, target)


def test_files_in_use_stay_open_and_idle_ones_go(tmp_path: Path) -> None:
    files = reader._OpenFiles(2)
    (tmp_path / "x").write_bytes(b"x")
    readers = [FileReader(tmp_path / "x", str(n)) for n in range(4)]

    def opened() -> reader._OpenFile:
        return reader._OpenFile(tmp_path / "x")

    with files.use(readers[0], opened) as kept:
        for other in readers[1:]:
            with files.use(other, opened):
                pass
        assert os.fstat(kept.fd)
        assert len(files._files) == 2
    for one in readers:
        files.close(one)
        one.close()


def test_where_others_take_the_descriptors_idle_files_go(tmp_path: Path) -> None:
    files = reader._OpenFiles(10)
    (tmp_path / "x").write_bytes(b"x")
    one, other = FileReader(tmp_path / "x", "x"), FileReader(tmp_path / "x", "x")
    with files.use(one, lambda: reader._OpenFile(tmp_path / "x")):
        pass
    tries: list[int] = []

    def refused_once() -> reader._OpenFile:
        tries.append(len(files._files))
        if len(tries) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return reader._OpenFile(tmp_path / "x")

    with files.use(other, refused_once):
        assert tries == [1, 0]
    for left in (one, other):
        files.close(left)
        left.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_what_the_system_refuses_costs_no_finished_shard(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    journal = tmp_path / ".out.expo-staging" / "journal.jsonl"
    copy = FileReader.copy
    tuning = Tuning(threads=1, chunk_bytes=64, block_elements=8)

    def refused(self: FileReader, begin: int, target: reader.Bytes) -> None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 1:
            with self._opened():
                raise OSError(number, os.strerror(number))
        copy(self, begin, target)

    with monkeypatch.context() as patched:
        patched.setattr(FileReader, "copy", refused)
        with pytest.raises(door.CheckpointError) as caught:
            run_plan(plan, tmp_path / "out", tuning=tuning)
    assert str(caught.value).endswith(
        f"cannot be read: {os.strerror(number)}; finished shards are kept, run the same command again"
    )
    said: list[str] = []
    run_plan(plan, tmp_path / "out", tuning=tuning, say=said.append)
    assert said[0].startswith("resuming: ")
    run_plan(plan, tmp_path / "fresh", tuning=tuning)
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")
