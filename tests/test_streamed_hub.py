"""Weights on the Hub read by range at a commit, where the Hub redirects to a store that fails now and then."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from expo.checkpoint import ranges
from expo.checkpoint.hub_file import HubFile
from expo.checkpoint.ranges import RangeReader
from expo.errors import CheckpointError, HubError

from .conftest import Pair, extrapolate
from .hub_server import COMMIT, Hub
from .range_server import FAULTS, RangeServer
from .test_hub import FLAGS, TOKEN, Client
from .test_remote import assert_same_files, large  # noqa: F401 - a fixture

NAME = "model.safetensors"


@pytest.fixture
def store(large: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:  # noqa: F811
    monkeypatch.setattr(ranges, "FIRST_PAUSE_SECONDS", 0.01)
    state = RangeServer({"org/sft": large.sft, "org/aligned": large.aligned})
    running = state.start()
    yield state
    running.shutdown()
    running.server_close()


@pytest.fixture
def hub(large: Pair, store: RangeServer) -> Iterator[Hub]:  # noqa: F811
    state = Hub({"org/sft": large.sft, "org/aligned": large.aligned})
    state.redirects_to = store.url.replace("127.0.0.1", "localhost")
    running = state.start()
    yield state
    running.shutdown()
    running.server_close()


@pytest.fixture
def content(large: Pair) -> bytes:  # noqa: F811
    return (large.sft / NAME).read_bytes()


def hub_file(hub: Hub, content: bytes) -> HubFile:
    url = f"{hub.url}/org/sft/resolve/{COMMIT}/{NAME}"
    return HubFile(url, f"org/sft/{NAME}", len(content), hashlib.sha256(content).hexdigest())


def reader(hub: Hub, content: bytes) -> RangeReader:
    return RangeReader(hub_file(hub, content), f"org/sft/{NAME}")


def read(one: RangeReader, begin: int, nbytes: int) -> bytes:
    target = np.empty(nbytes, dtype=np.uint8)
    one.copy(begin, target)
    return target.tobytes()


def test_a_streamed_merge(hub: Hub, store: RangeServer, large: Pair, tmp_path: Path) -> None:  # noqa: F811
    client = Client(hub, tmp_path / "hf")
    extrapolate(large.sft, large.aligned, tmp_path / "local", alpha=1.5)
    hub.repositories["org/sft"] = large.sft
    store.faults.extend(["cut", "short", "429", "500", "200"])
    out, pair = tmp_path / "out", ("org/sft", "org/aligned")
    planned = client.expo("plan", *pair, "--stream-inputs", "--json")
    report = json.loads(planned.stdout)
    assert (report["download_bytes"], report["stream_bytes"]) == (0, report["read_bytes"])
    store.sent.clear()
    ran = client.expo("extrapolate", *pair, out, *FLAGS, "--stream-inputs", HF_TOKEN=TOKEN)
    assert ran.returncode == 0, ran.stderr
    assert not store.faults
    assert_same_files(tmp_path / "local", out)
    assert not list(client.home.rglob("*.safetensors"))
    for path, sent in store.weights().items():
        size = hub.repositories[path[1:].partition("/resolve")[0]].joinpath(path.rpartition("/")[2]).stat().st_size  # fmt: skip
        assert [begin for begin, _ in sent] == [0, *(end for _, end in sent)][:-1]
        assert sent[-1][1] == size
    assert not store.authorizations
    manifest = json.loads((out / "expo.json").read_text())
    identity = manifest["inputs"][f"sft org/sft/{NAME}"]
    assert (identity["commit"], len(identity["sha256"])) == (COMMIT, 64)
    assert TOKEN not in ran.stdout + ran.stderr + json.dumps(manifest)


@pytest.mark.parametrize("fault", [*FAULTS, "403"])
def test_a_fault_is_asked_again(
    fault: str, hub: Hub, store: RangeServer, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo.checkpoint.hub_file._SKIPPABLE", 1000)
    store.faults.extend([fault] * 2)
    assert read(reader(hub, content), 1000, 50_000) == content[1000:51_000]
    assert not store.faults


def test_the_hub_is_asked_for_the_address_once(
    hub: Hub, store: RangeServer, content: bytes
) -> None:
    one = reader(hub, content)
    assert b"".join(read(one, at, 1000) for at in range(0, 10_000, 1000)) == content[:10_000]
    assert len(hub.requests) == 1
    assert len(store.sent) == 10


def test_a_server_that_goes_on_failing_is_one_line(
    hub: Hub, store: RangeServer, content: bytes
) -> None:
    store.faults.extend(["500"] * 100)
    with pytest.raises(CheckpointError) as error:
        read(reader(hub, content), 0, 1000)
    assert str(error.value) == f"org/sft/{NAME} cannot be read: the Hub answered 500 (6 tries): run again later"  # fmt: skip


def test_a_hub_without_ranges_is_one_line(
    hub: Hub, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.redirects_to, hub.honours_ranges = None, False
    assert read(reader(hub, content), 1000, 1000) == content[1000:2000]
    monkeypatch.setattr("expo.checkpoint.hub_file._SKIPPABLE", 1500)
    with pytest.raises(
        CheckpointError, match="leave out --stream-inputs, so that it is downloaded"
    ):
        read(reader(hub, content), 1000, 1000)


def test_a_file_that_changes_is_refused(
    hub: Hub, store: RangeServer, content: bytes, large: Pair  # noqa: F811
) -> None:  # fmt: skip
    one = reader(hub, content)
    read(one, 0, 1000)
    (large.sft / NAME).write_bytes(content[::-1])
    for asked in (one, reader(hub, content)):  # at an address that is known, and at a new one
        with pytest.raises(CheckpointError, match=f"org/sft/{NAME} changed while it was read"):
            read(asked, 0, 1000)


def test_a_file_that_is_gone(hub: Hub, content: bytes, large: Pair) -> None:  # noqa: F811
    (large.sft / NAME).unlink()
    with pytest.raises(HubError, match="the Hub answered 404"):
        read(reader(hub, content), 0, 1000)
