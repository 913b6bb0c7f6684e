"""What the tests of publishing share: the loopback Hub in this process, with the real client against it."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, close_session, constants
from huggingface_hub.utils import _http

import expo as door
from expo.demo.toy import MODELS
from expo.output.manifest import Manifest
from expo.publishing import upload
from expo.publishing.preflight import Preflight, preflight
from expo.publishing.repository import parse_target
from expo.results import PublishResult
from expo.verbs import publish as verb

from .conftest import extrapolate, nudged, weights, write_checkpoint
from .hub_writing import Account, Repo, WritableHub

os.environ |= {
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "1s",
}  # hf_xet waits by itself, in Rust, and reads these when it is first used

TOKEN = "hf_" + "secret" * 6
NAME = "org/model"
LFS = pytest.mark.parametrize("transport", ["lfs"])
"""For what does not depend on the transport."""

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
CLIENTS_OWN = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""A warning of the client about itself."""


def edit_manifest(out: Path, **changes: object) -> None:
    manifest = Manifest.from_json((out / "expo.json").read_bytes())
    (out / "expo.json").write_text(replace(manifest, **changes).to_json())  # type: ignore[arg-type]


@dataclass
class World:
    """A Hub, a model to publish, and the seconds that the client would have waited."""

    hub: WritableHub
    out: Path
    waits: list[float] = field(default_factory=list)

    @property
    def repo(self) -> Repo:
        return self.hub.repos[NAME]

    def prepare(self, **flags: object) -> Preflight:
        """Everything before the first byte but the verification: these tensors are of no model."""
        flags.setdefault("licence", "apache-2.0")  # these parents name none
        names = ("revision", "create_pr")
        target = parse_target(NAME, **{k: flags.pop(k) for k in names if k in flags})  # type: ignore[arg-type]
        return preflight(HfApi(), self.out, target, **flags)  # type: ignore[arg-type]

    def publish(self, **flags: object) -> PublishResult:
        sign = flags.pop("sign", None)
        ready = self.prepare(signs=sign is not None, **flags)
        return verb.send(ready, sign=sign)  # type: ignore[arg-type]

    def is_published(self, branch: str = "main") -> bool:
        """Whether the branch holds the manifest's files, and no other weights."""
        files = self.prepare().files
        there = self.repo.head(branch)
        weights = {name for name in there if name.endswith((".safetensors", ".index.json"))}
        return weights <= {f.name for f in files} and all(
            f.name in there and there[f.name].size == f.nbytes
            and f.sha256 == (there[f.name].sha256 or f.sha256) and (there[f.name].sha256 or there[f.name].oid == f.blob_id)
            for f in files
        )  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three shards, of made-up tensors: it is not verified, and nothing is known of its tensors, so
    that there is no heat map to draw."""
    folder = tmp_path_factory.mktemp("publishing")
    sft = weights()
    write_checkpoint(folder / "sft", sft)
    write_checkpoint(folder / "aligned", nudged(sft), shards=3)
    out = extrapolate(folder / "sft", folder / "aligned", folder / "out", alpha=1.5).out
    edit_manifest(out, tensors={})
    return out


@pytest.fixture(scope="session")
def made_real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that verifies."""
    out = tmp_path_factory.mktemp("publishing-real") / "out"
    return door.extrapolate(MODELS / "sft", MODELS / "aligned", out, alpha=1.5).out


@pytest.fixture(params=["lfs", "xet"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def world(
    transport: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    hub = WritableHub(accounts={TOKEN: Account()})
    if transport == "xet":
        hub.xet = tmp_path / "cas"
    server = hub.start()
    world = World(hub, Path(shutil.copytree(made, tmp_path / "out")))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transport == "lfs")
    quick = SimpleNamespace(**vars(time) | {"sleep": world.waits.append})
    for module in (_http, upload):  # time itself would make every other wait a busy one
        monkeypatch.setattr(module, "time", quick)
    monkeypatch.setattr(verb, "_SMALL", 2000)  # these shards are large ones
    yield world
    close_session()
    server.shutdown()
    server.server_close()
