"""A merge on the nodes of a Ray cluster: the bytes of one process, whatever becomes of nodes and driver."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import expo as door
from expo.compute.stream import Tuning
from expo.distribution.ray_task import Fault, Job, Task, compute
from expo.output.journal import Fingerprint, fingerprint, identities
from expo.output.sink import FinishedShard
from expo.output.staging import Staging
from expo.planning.build import build_plan
from expo.spec.request import make_request

from .conftest import Pair, Ran, extrapolate, nudged, write_checkpoint
from .test_merge import digest
from .test_safety import wait_for

STAGING = ".out.expo-staging"
SHARDS = 24


# Without Ray: what a node does


@pytest.fixture
def job(pair: Pair, tmp_path: Path) -> Iterator[Job]:
    """As a driver has begun it."""
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    print_ = fingerprint(plan, identities(plan))
    with Staging(tmp_path / "out") as staging:
        staging.resume(print_)
        yield Job(door.__version__, tmp_path, (plan.request,), (staging.out,), (print_,), Tuning())


def test_a_task_computes_its_shard_into_the_staging_directory(job: Job, tmp_path: Path) -> None:
    (shard,) = _shards(compute(job, Task(1, (0,)), lambda *_: None))
    assert shard.file == "model-00002-of-00003.safetensors"
    assert (tmp_path / STAGING / shard.file).stat().st_size == shard.file_bytes
    (again,) = _shards(compute(job, Task(1, (0,)), lambda *_: None))
    assert again == shard


def _shards(result: list[FinishedShard] | Fault) -> list[FinishedShard]:
    assert isinstance(result, list), result
    return result


def _other_version(job: Job) -> Job:
    return replace(job, version="0.0")


def _other_inputs(job: Job) -> Job:
    key = next(name for name in job.prints[0].parts if name.startswith("sft "))
    return replace(job, prints=(Fingerprint(job.prints[0].parts | {key: "{}"}),))


def _other_disk(job: Job) -> Job:
    return replace(job, outs=(job.directory / "elsewhere" / "out",))


@pytest.mark.parametrize(("change", "words"), [
    (_other_version, f"has expo {door.__version__}, the driver 0.0: install one version"),
    (_other_inputs, "sees other inputs than the driver (sft sft/model.safetensors differ): give all nodes the same"),
    (_other_disk, "name an OUT on a disk that all nodes share"),
])  # fmt: skip
def test_a_node_that_cannot(change: Callable[[Job], Job], words: str, job: Job) -> None:
    result = compute(change(job), Task(0, (0,)), lambda *_: None)
    assert isinstance(result, Fault)
    assert result.text.startswith(f"node {os.uname().nodename}: ")
    assert result.text.endswith(words)
    assert not result.is_of_system
    assert not (job.directory / "elsewhere").exists()


def test_a_fault_of_the_system_may_be_mended_elsewhere(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("expo.disk.reserve", full)
    result = compute(job, Task(0, (0,)), lambda *_: None)
    assert isinstance(result, Fault)
    assert result.is_of_system


def test_a_fault_without_words_has_a_name(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expo.distribution.ray_task.stream", Mock(side_effect=MemoryError))
    result = compute(job, Task(0, (0,)), lambda *_: None)
    assert result == Fault(f"node {os.uname().nodename}: MemoryError", is_of_system=True)


def test_it_needs_ray(
    pair: Pair, expo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "expo.distribution.ray_engine", raising=False)
    ran = expo(
        "extrapolate", pair.sft, pair.aligned, "out", "--alpha", 1.5, "--engine", "ray", "-q"
    )
    assert ran.code == 1
    assert ran.err == "expo: --engine ray needs Ray: pip install 'expo-merge[ray]'\n"


@pytest.mark.parametrize(("flags", "words"), [
    (("--address", "auto"), "--address: goes with --engine ray"),
    (("--engine", "ray", "--join"), "give --join, --worker or --engine, one of them"),
    (("--engine", "ray", "--push"), "--engine: not with --push"),
])  # fmt: skip
def test_what_does_not_go_together(
    flags: tuple[str, ...], words: str, pair: Pair, expo: Callable[..., Ran]
) -> None:
    ran = expo("extrapolate", pair.sft, pair.aligned, "org/name", "--alpha", 1.5, *flags)
    assert ran.code == 2
    assert words in ran.err


# With a cluster of three nodes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={**one, "include_dashboard": False})
    for _ in range(2):
        made.add_node(**one)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of 24 shards, and what one process makes of it."""
    place = tmp_path_factory.mktemp("models")
    tensors = {f"w{n}": torch.randn(250, 1000, generator=torch.Generator().manual_seed(n)).bfloat16()
               for n in range(SHARDS)}  # fmt: skip
    write_checkpoint(place / "sft", tensors, shards=SHARDS)
    write_checkpoint(place / "aligned", nudged(tensors), shards=SHARDS)
    extrapolate(place / "sft", place / "aligned", place / "alone", alpha=1.3, verify=False)
    return place


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    for side in ("sft", "aligned"):
        (tmp_path / side).symlink_to(models / side)
    return tmp_path


def drive(place: Path, cluster: Any, *flags: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "expo",
        "extrapolate",
        "sft",
        "aligned",
        "out",
        "--alpha",
        "1.3",
    ]
    return subprocess.Popen(
        [*command, "--no-verify", "--engine", "ray", "--address", cluster.address, *flags],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(place: Path) -> int:
    return len(list((place / STAGING).glob("*.safetensors")))


def check(place: Path, models: Path, process: subprocess.Popen[str]) -> str:
    """That it ends well, with the bytes of one process and nothing beside them; what it says."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.startswith("asked  ExPO")
    assert sorted(p.name for p in place.iterdir()) == ["aligned", "out", "sft"]
    assert digest(place / "out") == digest(models / "alone")
    return err


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_node_that_is_lost_and_a_driver_that_is_killed(
    cluster: Any, place: Path, models: Path
) -> None:
    process = drive(place, cluster)
    assert wait_for(lambda: finished(place) >= 2, process)
    process.kill()
    process.communicate()
    before = finished(place)
    assert 0 < before < SHARDS
    process = drive(place, cluster)
    assert wait_for(lambda: finished(place) > before + 2, process)
    node = cluster.worker_nodes.copy().pop()
    cluster.remove_node(node, allow_graceful=False)
    assert finished(place) < SHARDS
    err = check(place, models, process)
    assert f"of {SHARDS} shards done for out" in err


@pytest.mark.slow
def test_nodes_that_go_are_told() -> None:
    from expo.distribution.ray_engine import lost

    assert lost(1, 2) == "a node is gone, 2 left: what was computed there is computed again"
    assert lost(2, 1).startswith("2 nodes are gone, 1 left")


@pytest.mark.slow
@pytest.mark.parametrize(("address", "words"), [
    ("127.0.0.1:1", r"\(.*Connection refused\)"),
    ("nonsense", r"\(Invalid address format: nonsense\)"),
])  # fmt: skip
def test_a_cluster_that_is_not_there(address: str, words: str) -> None:
    from expo.distribution.ray_engine import RayEngine

    with pytest.raises(
        door.ExpoError, match=f"no Ray cluster at {address} {words}: see `ray status` there"
    ):
        RayEngine(address)


@pytest.mark.slow
def test_a_client_of_a_cluster_is_refused() -> None:
    from expo.distribution.ray_engine import RayEngine

    with pytest.raises(door.ExpoError, match="not a client of it: give its head's HOST:PORT"):
        RayEngine("ray://127.0.0.1:10001")


@pytest.mark.slow
def test_a_mistake_on_a_node_stays_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from expo.distribution import ray_engine

    def fails_by(cause: Exception) -> None:
        error = ray_engine.RayTaskError("task", f"Traceback\n{cause!r}", cause)
        monkeypatch.setattr(ray_engine.ray, "get", Mock(side_effect=error))

    fails_by(KeyError("a mistake"))
    with pytest.raises(KeyError, match="a mistake"):
        ray_engine._result(Mock())
    for cause in (ray_engine.RaySystemError("x"), RuntimeError(ray_engine._NOT_IMPORTED)):
        fails_by(cause)
        result = ray_engine._result(Mock())
        assert isinstance(result, Fault)
        assert "a node cannot run expo (" in result.text


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_several_alphas_from_one_read(cluster: Any, place: Path, models: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "expo",
        "extrapolate",
        "sft",
        "aligned",
        "out",
        "--alphas",
        "1.1,1.3",
    ]
    flags = ["--no-verify", "--engine", "ray", "--address", cluster.address]
    subprocess.run([*command, *flags], cwd=place, check=True, capture_output=True)
    assert digest(place / "out-alpha-1.3") == digest(models / "alone")


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_damaged_input_is_named_with_its_node(cluster: Any, tmp_path: Path) -> None:
    tensors = {f"w{n}": torch.ones(4, 4) for n in range(3)}
    write_checkpoint(tmp_path / "sft", tensors, shards=3)
    write_checkpoint(
        tmp_path / "aligned", tensors | {"w1": torch.full((4, 4), torch.nan)}, shards=3
    )
    process = drive(tmp_path, cluster, "-q")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert (
        err
        == f"expo: node {os.uname().nodename}: w1 holds NaN or Inf in the aligned model: it is damaged\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "sft"]
