"""Reading and writing: around the page cache, through it where it must be, in constant memory."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from expo.checkpoint import reader
from expo.checkpoint.reader import FileReader, aligned_buffer, read_buffer
from expo.errors import CheckpointError
from expo.output import writer
from expo.output.writer import ShardWriter

from .conftest import Pair, extrapolate
from .test_merge import assert_same, load, naive


def cached_share(path: Path) -> float:
    """The share of a file's pages that the page cache holds."""
    opened = FileReader(path, path.name)
    share = float(opened._cached_pages(0, path.stat().st_size).mean())
    opened.close()
    return share


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def nothing_cached(_reader: FileReader, _begin: int, nbytes: int) -> np.ndarray:
    return np.zeros(nbytes // 4096 + 2, dtype=np.bool_)


def uncached_pair(tmp_path: Path) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    for side in ("sft", "aligned"):
        (tmp_path / side).mkdir()
        path = tmp_path / side / "model.safetensors"
        save_file({"w": (torch.randn(3000, 1000, generator=generator) * 0.02).bfloat16()}, path)
        drop(path)
        if cached_share(path) > 0:
            pytest.skip("this filesystem does not drop pages (tmpfs)")
    return tmp_path / "sft", tmp_path / "aligned"


def test_what_was_not_cached_stays_out_and_what_was_stays_in(tmp_path: Path) -> None:
    sft, aligned = uncached_pair(tmp_path)
    (sft / "model.safetensors").read_bytes()
    extrapolate(sft, aligned, tmp_path / "out", alpha=1.5)
    assert cached_share(sft / "model.safetensors") == 1.0
    assert cached_share(aligned / "model.safetensors") < 0.05  # the header's pages at most
    assert cached_share(tmp_path / "out" / "model.safetensors") < 0.05
    assert_same(load(tmp_path / "out"), naive(load(sft), load(aligned), 1.5))


def test_gaps_in_the_cache_are_filled_and_emptied_again(tmp_path: Path) -> None:
    sft, aligned = uncached_pair(tmp_path)
    path = sft / "model.safetensors"
    path.read_bytes()
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    for start in range(1 << 20, size, 2 << 20):  # an eighth of the file, in pieces
        os.posix_fadvise(fd, start, 1 << 18, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    before = cached_share(path)
    assert 0.75 < before < 1.0
    extrapolate(sft, aligned, tmp_path / "out", alpha=1.5)
    assert abs(cached_share(path) - before) < 0.02
    assert_same(load(tmp_path / "out"), naive(load(sft), load(aligned), 1.5))


def test_without_direct_io_the_pages_are_dropped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, aligned = uncached_pair(tmp_path)
    for module in (reader, writer):
        monkeypatch.setattr(module, "open_direct", lambda *_: None)
    extrapolate(sft, aligned, tmp_path / "out", alpha=1.5)
    for folder in (sft, aligned, tmp_path / "out"):
        assert cached_share(folder / "model.safetensors") < 0.2
    assert_same(load(tmp_path / "out"), naive(load(sft), load(aligned), 1.5))


def test_a_filesystem_that_takes_the_flag_but_not_the_transfer(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read, real_write = os.preadv, os.pwrite

    def refuse(fd: int) -> None:  # by the descriptor's own flag: numbers are used again
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(FileReader, "_cached_pages", nothing_cached)
    monkeypatch.setattr(os, "preadv", lambda fd, *a: refuse(fd) or real_read(fd, *a))
    monkeypatch.setattr(os, "pwrite", lambda fd, *a: refuse(fd) or real_write(fd, *a))
    extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5)
    assert_same(load(tmp_path / "out"), naive(pair.sft_tensors, pair.aligned_tensors, 1.5))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_tmpfs(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        shutil.copytree(pair.sft, f"{folder}/sft")
        shutil.copytree(pair.aligned, f"{folder}/aligned")
        extrapolate(f"{folder}/sft", f"{folder}/aligned", f"{folder}/out", alpha=1.5)
        expected = naive(pair.sft_tensors, pair.aligned_tensors, 1.5)
        assert_same(load(Path(folder, "out")), expected)


@pytest.mark.parametrize("cached", [True, False])
def test_any_range_is_read_right(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    if not cached:
        monkeypatch.setattr(FileReader, "_cached_pages", nothing_cached)
    opened = FileReader(path, "file")
    for begin, end in [
        (0, 1),
        (0, 50_000),
        (4095, 4097),
        (1, 8192),
        (4096, 8192),
        (49_999, 50_000),
    ]:
        buffer = read_buffer(end - begin)
        view = opened.open_range(begin, end - begin, buffer)
        if view is None:
            view = buffer[: end - begin]
            opened.copy(begin, view)
        assert np.array_equal(view, content[begin:end])
    target = np.empty(10, dtype=np.uint8)
    with pytest.raises(CheckpointError, match="file was cut short while it was read"):
        opened.copy(49_995, target)
    opened.close()


def test_the_writer_cuts_its_padding_off(tmp_path: Path) -> None:
    pages = aligned_buffer(8192)
    pages[:] = np.arange(8192) % 251
    shard = ShardWriter(tmp_path / "x", 5000)
    shard.write(4096, pages[4096:])
    shard.write(0, pages[:4096])
    shard.finish()
    assert (tmp_path / "x").read_bytes() == pages[:5000].tobytes()


_PEAK = """
import sys, threading, expo
from expo.spec.request import make_request
from expo.verbs.running import run_plans
from expo.planning.build import build_plan
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) << 10
import torch
bare, peak = anonymous(), 0
def tick(*_):
    global peak
    peak = max(peak, anonymous())
run_plans([build_plan(make_request("sft", "aligned", alpha=1.5))], [__import__("pathlib").Path("out")], progress=tick)
print(peak - bare)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    used = []
    for rows in (30_000, 120_000):  # one tensor of 60 and of 240 MB
        folder = tmp_path / str(rows)
        for side in ("sft", "aligned"):
            (folder / side).mkdir(parents=True)
            tensor = torch.full((rows, 1000), 0.5 if side == "sft" else 0.75, dtype=torch.bfloat16)
            save_file({"w": tensor}, folder / side / "model.safetensors")
        done = subprocess.run(
            [sys.executable, "-c", _PEAK], cwd=folder, capture_output=True, text=True, check=True
        )
        used.append(int(done.stdout))
    assert max(used) < 200e6
    assert used[1] < used[0] + 40e6
