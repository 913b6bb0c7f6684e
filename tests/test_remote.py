"""Inputs without a download: stores and web servers on loopback, in this process."""

import http.client
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import expo as door
from expo.checkpoint import ranges
from expo.checkpoint.reference import parse_reference
from expo.checkpoint.store import open_store
from expo.errors import CheckpointError, SpecError

from .conftest import Pair, Ran, Tensors, extrapolate, nudged, write_checkpoint
from .range_server import FAULTS, RangeServer

Expo = Callable[..., Ran]


def large_weights() -> Tensors:
    """More than what is read with the headers, in tensors that are no multiple of anything."""
    generator = torch.Generator().manual_seed(7)
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (171, 333) for n in range(4)}
    shapes |= {f"model.layers.{n}.input_layernorm.weight": (333,) for n in range(4)}
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


@pytest.fixture
def large(tmp_path: Path) -> Pair:
    sft = large_weights()
    aligned = nudged(sft)
    return Pair(
        write_checkpoint(tmp_path / "sft", sft),
        write_checkpoint(tmp_path / "aligned", aligned, shards=2),
        sft,
        aligned,
    )


@pytest.fixture
def server(large: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(ranges, "FIRST_PAUSE_SECONDS", 0.01)
    state = RangeServer({"sft": large.sft, "aligned": large.aligned})
    running = state.start()
    yield state
    running.shutdown()
    running.server_close()


def assert_each_byte_once(server: RangeServer, pair: Pair) -> None:
    """Of every weight file all bytes have been sent, and none of them twice."""
    files = {f"/{folder.name}/{path.name}": path.stat().st_size
             for folder in (pair.sft, pair.aligned) for path in folder.glob("*.safetensors")}  # fmt: skip
    sent = server.weights()
    assert sent.keys() == files.keys()
    for name, size in files.items():
        ends = [0, *(end for _, end in sent[name])]
        assert [begin for begin, _ in sent[name]] == ends[:-1], name
        assert ends[-1] == size


def assert_same_files(one: Path, other: Path) -> None:
    names = {path.name for path in one.iterdir()} - {"expo.json", "README.md"}
    assert names == {path.name for path in other.iterdir()} - {"expo.json", "README.md"}
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_bytes_are_those_of_a_local_merge_and_each_is_read_once(
    server: RangeServer, large: Pair, tmp_path: Path
) -> None:
    extrapolate(large.sft, large.aligned, tmp_path / "local", alpha=1.5)
    result = extrapolate(f"{server.url}/sft", f"{server.url}/aligned/", tmp_path / "out", alpha=1.5)
    assert_same_files(tmp_path / "local", result.out)
    assert_each_byte_once(server, large)
    manifest = json.loads((result.out / "expo.json").read_text())
    assert manifest["sources"]["sft"]["model"] == f"{server.url}/sft"
    identity = manifest["inputs"][f"sft {server.url}/sft/model.safetensors"]
    assert identity["bytes"] == (large.sft / "model.safetensors").stat().st_size
    assert len(identity["etag"]) == 32


@pytest.mark.parametrize("method", ["ties", "dare_linear", "slerp", "low_rank", "laser"])
def test_methods_that_look_at_whole_tensors_read_them_once(
    method: str, server: RangeServer, large: Pair, tmp_path: Path
) -> None:
    def spec(sft: object, aligned: object) -> dict:
        if method == "slerp":
            models: list = [{"model": str(sft)}, {"model": str(aligned)}]
            return {"merge_method": "slerp", "base_model": str(sft), "models": models, "parameters": {"t": 0.4}}  # fmt: skip
        if method in ("low_rank", "laser"):
            key = "transforms" if method == "low_rank" else "edits"
            models = [{"model": str(aligned), "parameters": {"alpha": 1.5}}]
            return {"merge_method": "expo", "base_model": str(sft), "models": models, key: [{method: {"keep": "rank=4"}}]}  # fmt: skip
        models = [{"model": str(aligned), "parameters": {"density": 0.5, "weight": 1.0}}]
        return {"merge_method": method, "base_model": str(sft), "models": models}

    door.merge(spec(large.sft, large.aligned), tmp_path / "local", verify=False)
    remote = spec(f"{server.url}/sft", f"{server.url}/aligned")
    door.merge(remote, tmp_path / "out", verify=False)
    assert_same_files(tmp_path / "local", tmp_path / "out")
    assert_each_byte_once(server, large)


def test_diff_and_spectrum_read_each_byte_once(server: RangeServer, large: Pair) -> None:
    remote = f"{server.url}/sft", f"{server.url}/aligned"
    here = door.diff(large.sft, large.aligned)
    assert door.diff(*remote).tensors == here.tensors
    assert_each_byte_once(server, large)
    server.sent.clear()
    found = door.spectrum(remote[1], minus=remote[0])
    assert found == door.spectrum(large.aligned, minus=large.sft)
    every = [one for sent in server.weights().values() for one in sent]
    assert sum(end - begin for begin, end in every) <= sum(
        path.stat().st_size for folder in (large.sft, large.aligned) for path in folder.glob("*.s*")
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_under_a_range_is_asked_again(
    fault: str, server: RangeServer, large: Pair, tmp_path: Path
) -> None:
    extrapolate(large.sft, large.aligned, tmp_path / "local", alpha=1.5)
    server.faults.extend([fault] * 3)
    extrapolate(f"{server.url}/sft", f"{server.url}/aligned", tmp_path / "out", alpha=1.5)
    assert not server.faults
    assert_same_files(tmp_path / "local", tmp_path / "out")


def test_a_server_without_ranges_is_one_line(
    server: RangeServer, tmp_path: Path, expo: Expo
) -> None:
    server.faults.extend(["200"] * 100)
    ran = expo("extrapolate", f"{server.url}/sft", f"{server.url}/aligned", tmp_path / "out", "--alpha", 1.5)  # fmt: skip
    assert ran.code == 1
    assert ran.err.strip().endswith(
        "cannot be read: the server sends whole files, no ranges (6 tries): bring the model to this disk first"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_changes_under_a_read_is_refused(
    tags: bool, server: RangeServer, large: Pair, tmp_path: Path
) -> None:
    server.tags = tags
    store = open_store(f"{server.url}/sft")
    reader = store.reader("model.safetensors")
    path = large.sft / "model.safetensors"
    path.write_bytes(path.read_bytes()[::-1] + (b"" if tags else b"more"))
    with pytest.raises(CheckpointError, match=r"sft/model.safetensors changed while it was read: run again"):  # fmt: skip
        reader.copy(0, np.empty(1000, dtype=np.uint8))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        store.identity("model.safetensors")


def test_a_change_is_found_at_the_end(
    server: RangeServer, large: Pair, tmp_path: Path, expo: Expo
) -> None:
    """All ranges were read before: the identity that is looked at last is another one."""

    def change(done: int, total: int) -> None:
        if done >= total - 20_000:  # the headers do not count as done
            (large.sft / "model.safetensors").write_bytes(b"another")

    with pytest.raises(CheckpointError, match=r"sft/model.safetensors changed while it was read"):
        door.merge(
            {
                "merge_method": "expo",
                "base_model": f"{server.url}/sft",
                "models": [{"model": f"{server.url}/aligned", "parameters": {"alpha": 1.5}}],
            },
            tmp_path / "out",
            verify=False,
            progress=change,
        )
    assert not (tmp_path / "out").exists()


def test_the_plan_says_what_is_streamed(server: RangeServer, expo: Expo) -> None:
    ran = expo("plan", f"{server.url}/sft", f"{server.url}/aligned", "--json")
    report = json.loads(ran.out)
    assert report["sft"]["kind"] == "object store"
    assert report["download_bytes"] == 0
    assert report["stream_bytes"] == report["read_bytes"] > 0
    text = expo("plan", f"{server.url}/sft", f"{server.url}/aligned").out
    assert (
        "reads      0.92 MB, 0.92 MB of it streamed by range (each byte once), no weights to download\n"
        in text
    )


def test_what_needs_a_folder_is_refused(server: RangeServer, tmp_path: Path, expo: Expo) -> None:
    pair = (f"{server.url}/sft", f"{server.url}/aligned")
    ran = expo("extrapolate", *pair, tmp_path / "out", "--alpha", 1.5, "--hash-inputs")
    assert (ran.code, "streamed ones are read once" in ran.err) == (2, True)
    (tmp_path / "texts").write_text("one text\nanother text\n")
    ran = expo("laser", pair[0], tmp_path / "out", "--keep", "rank=4", "--accept-if", "perplexity", "--texts", tmp_path / "texts")  # fmt: skip
    assert (ran.code, "bring it to this disk first" in ran.err) == (2, True)


NAMES = {
    "s3://": "SFT: s3:// names no bucket or host: write s3://NAME/PREFIX",
    "https://me:secret@host/model": "SFT: https://host/model may have no user, password or query: credentials "
    "come from the environment, and a model is a prefix",
    "https://host/model?sig=secret": "SFT: https://host/model may have no user, password or query: credentials "
    "come from the environment, and a model is a prefix",
}  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_addresses_that_cannot_be_taken(text: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_reference(text, role="SFT")
    assert str(error.value) == NAMES[text]


def test_an_address_and_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    reference = parse_reference(f"s3://bucket/models/sft/+{tmp_path / 'adapter'}")
    assert reference.model.url == "s3://bucket/models/sft"
    assert reference.adapter is not None
    assert reference.adapter.path == tmp_path / "adapter"


def test_a_server_that_has_no_model_is_one_line(server: RangeServer, expo: Expo) -> None:
    ran = expo("plan", f"{server.url}/none", f"{server.url}/aligned")
    assert (ran.code, ran.err) == (1, f"expo: {server.url}/none holds no file of a model: check the prefix\n")  # fmt: skip


def test_an_adapter_is_streamed_too(server: RangeServer, large: Pair, tmp_path: Path) -> None:
    door.extract_lora(large.aligned, tmp_path / "adapter", minus=large.sft, rank=2)
    server.folders = {**server.folders, "adapter": tmp_path / "adapter"}
    extrapolate(large.sft, f"{large.sft}+{tmp_path / 'adapter'}", tmp_path / "local", alpha=1.5)
    address = f"{server.url}/sft+{server.url}/adapter"
    extrapolate(f"{server.url}/sft", address, tmp_path / "out", alpha=1.5)
    assert_same_files(tmp_path / "local", tmp_path / "out")
    sent = server.weights()["/adapter/adapter_model.safetensors"]
    assert sum(end - begin for begin, end in sent) == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size  # fmt: skip


# Against an S3 server, by way of the same faults.

S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    with subprocess.Popen([sys.executable, "-c", S3_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, env=environment) as process:  # fmt: skip
        assert process.stdout is not None
        host, port = process.stdout.readline().split()
        yield host, int(port)
        process.kill()


SECRET = "sekrit/" * 5


@pytest.fixture
def bucket(
    s3: tuple[str, int], large: Pair, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RangeServer]:
    """The pair in a bucket; what is asked goes through a server that can fail."""
    proxy = RangeServer(upstream=s3)
    running = proxy.start()
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert http_put(s3, "/bucket") == 200
    for path in (*large.sft.iterdir(), *large.aligned.iterdir()):
        key = f"/bucket/models/{path.parent.name}/{path.name}"
        assert http_put(s3, key, path.read_bytes()) == 200
    yield proxy
    running.shutdown()
    running.server_close()


OWNER = "AWS4-HMAC-SHA256 Credential=a/20261121/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def http_put(address: tuple[str, int], path: str, body: bytes = b"") -> int:
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request("PUT", path, body, {"Authorization": OWNER})
    status = connection.getresponse().status
    connection.close()
    return status


PAIR = ("s3://bucket/models/sft", "s3://bucket/models/aligned")


def test_a_bucket_gives_the_bytes_of_a_local_merge(
    bucket: RangeServer, large: Pair, tmp_path: Path, expo: Expo
) -> None:
    extrapolate(large.sft, large.aligned, tmp_path / "local", alpha=1.5)
    bucket.faults.extend(["cut", "500", "429", "200"])
    ran = expo("extrapolate", *PAIR, tmp_path / "out", "--alpha", 1.5)
    assert ran.code == 0, ran.err
    assert not bucket.faults
    assert_same_files(tmp_path / "local", tmp_path / "out")
    assert bucket.authorizations
    assert SECRET not in ran.out + ran.err + (tmp_path / "out" / "expo.json").read_text()


def test_each_byte_of_a_bucket_is_read_once(
    bucket: RangeServer, large: Pair, tmp_path: Path
) -> None:
    extrapolate(*PAIR, tmp_path / "out", alpha=1.5)
    for name, sent in bucket.weights().items():
        size = (large.sft.parent / name.removeprefix("/bucket/models/")).stat().st_size
        assert [begin for begin, _ in sent] == [0, *(end for _, end in sent)][:-1]
        assert sent[-1][1] == size


def test_an_object_that_changes_is_refused(
    bucket: RangeServer, s3: tuple[str, int], large: Pair
) -> None:
    store = open_store(PAIR[0])
    changed = (large.sft / "model.safetensors").read_bytes()[::-1]
    assert http_put(s3, "/bucket/models/sft/model.safetensors", changed) == 200
    with pytest.raises(CheckpointError, match="changed while it was read: run again"):
        store.reader("model.safetensors").copy(0, np.empty(1000, dtype=np.uint8))


def test_what_a_store_refuses_is_one_line_without_secrets(bucket: RangeServer, expo: Expo) -> None:
    ran = expo("plan", "s3://none/models/sft", PAIR[1])
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert "s3://none/models/sft cannot be read: the store answered 404" in ran.err
    assert SECRET not in ran.err


def test_the_commands_of_the_page(
    bucket: RangeServer, tmp_path: Path, expo: Expo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "remote.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("expo ") and "s3://" in line]
    assert len(lines) == 3
    for line in lines:
        assert expo(*shlex.split(line)[1:]).code == 0, line
