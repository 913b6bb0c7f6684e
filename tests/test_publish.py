"""`expo publish`: what is looked at before, what is sent, what the receipt says."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils._xet import get_xet_session

import expo as door
from expo.cli.publish_text import publish_plan_text
from expo.errors import CheckpointError, HubError, SpecError, VerificationError
from expo.publishing import watch
from expo.results import PublishPlan, PublishResult
from expo.verbs.publish import send

from .conftest import Ran
from .hub_writing import SIGNATURE, Fault
from .publishing import CLIENTS_OWN, LFS, NAME, SHARDS, TOKEN, World, edit_manifest
from .xet_store import xet_hashes

pytestmark = CLIENTS_OWN


def weight_bytes(world: World) -> int:
    return sum((world.out / name).stat().st_size for name in SHARDS)


@pytest.fixture
def command(
    world: World, made_real: Path, tmp_path: Path, expo: Callable[..., Ran]
) -> Callable[..., Ran]:
    """`expo publish` of a model that verifies."""
    world.out = Path(shutil.copytree(made_real, tmp_path / "real"))
    return lambda *flags: expo("publish", world.out, NAME, "--license", "apache-2.0", *flags)


@pytest.mark.parametrize("transport", ["lfs", pytest.param("xet", marks=pytest.mark.slow)])
def test_the_whole_way(world: World, command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = command("--yes", "--json", "--receipt", tmp_path / "receipt.json")
    assert ran.code == 0, ran.err
    receipt = json.loads(ran.out)
    assert receipt == json.loads((tmp_path / "receipt.json").read_text())
    assert receipt.keys() == {field.name for field in dataclasses.fields(PublishResult)}
    assert receipt["commit"] == world.repo.branches["main"]
    assert receipt["url"] == f"{world.hub.url}/{NAME}/commit/{receipt['commit']}"
    assert world.is_published()
    assert world.repo.private
    assert receipt["files"].keys() | {".gitattributes"} == world.repo.head().keys()
    again = world.publish()
    assert (again.commit, again.bytes_sent) == (receipt["commit"], 0)
    assert again.bytes_skipped == receipt["bytes_sent"]
    seen = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert TOKEN not in ran.out + ran.err
    assert TOKEN.encode() not in seen


@LFS
def test_a_dry_run_prints_the_plan_and_sends_nothing(world: World) -> None:
    world.hub.create(NAME, {"old.bin": b"old", "notes.md": b"kept"})
    (world.out / "scratch.txt").write_text("mine")
    before = dict(world.repo.head())
    plan = world.prepare().plan
    lines = dict(line.split(maxsplit=1) for line in publish_plan_text(plan).splitlines())
    assert lines["deletes"] == "old.bin (3 bytes)"
    assert lines["keeps"] == ".gitattributes (25 bytes), notes.md (4 bytes)"
    assert lines["leaves"] == "scratch.txt (4 bytes)"
    assert lines["as"] == "ada"
    assert plan.bytes_to_send == plan.bytes_in_all == sum(plan.send.values())
    assert world.repo.head() == before
    sent = [line for line in world.hub.asked() if not line.startswith("GET")]
    assert set(sent) == {"POST /api/validate-yaml"}


@LFS
def test_what_does_not_verify_is_refused_with_3(world: World, command: Callable[..., Ran]) -> None:
    config = world.out / "generation_config.json"
    config.write_text(config.read_text() + " ")
    ran = command("--yes")
    assert ran.code == 3
    assert ran.err.splitlines()[-1] == (
        f"expo: {world.out} does not verify: generation_config.json was edited, or "
        "loaded and saved again: restore the files, or run the merge again"
    )
    edit_manifest(world.out, verified=False)
    marked = command("--yes")
    assert marked.code == 3
    assert 'is marked "verified": false by its expo.json' in marked.err
    assert not world.hub.repos


@pytest.mark.slow
@LFS
def test_what_tells_of_the_model_may_change(world: World, command: Callable[..., Ran]) -> None:
    (world.out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (world.out / "diff.png").write_bytes(b"picture")
    (world.out / ".eval_results").mkdir()
    (world.out / ".eval_results" / "mt-bench.yaml").write_text("[]")
    assert command("--yes").code == 0
    assert {"diff.png", ".eval_results/mt-bench.yaml"} <= world.repo.head().keys()
    assert world.repo.head()["README.md"].content == (world.out / "README.md").read_bytes()
    assert world.is_published()


@pytest.mark.slow
@LFS
def test_it_asks_first(
    world: World, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = json.loads(command("--dry-run", "--json").out)
    assert plan.keys() == {field.name for field in dataclasses.fields(PublishPlan)}
    monkeypatch.setattr("expo.cli.publish._has_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert command("-q").code == 1
    assert not world.hub.repos
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    ran = command("-q")
    assert ran.code == 0
    assert ran.err.startswith(f"to         {world.hub.url}/{NAME} (new, private), main\n")
    assert world.is_published()


@LFS
def test_without_a_terminal_it_needs_a_yes(world: World, expo: Callable[..., Ran]) -> None:
    ran = expo("publish", world.out, NAME)
    assert ran.code == 2
    assert "there is no terminal to ask on: add --yes, or --dry-run to see the plan" in ran.err
    assert not world.hub.requests


@LFS
def test_a_receipt_that_cannot_be_written_is_told_first(
    world: World, expo: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = expo("publish", world.out, NAME, "--yes", "--receipt", tmp_path / "none" / "r.json")
    assert (ran.code, world.hub.requests) == (1, [])
    assert "cannot be written: name a file in a folder that exists" in ran.err


@pytest.mark.slow
@LFS
def test_the_python_door(world: World, made_real: Path, tmp_path: Path) -> None:
    real = shutil.copytree(made_real, tmp_path / "real")
    done: list[tuple[int, int]] = []
    result = door.publish(real, NAME, license="mit", progress=lambda *now: done.append(now))
    assert result.commit == world.repo.branches["main"]
    assert done == sorted(done)
    assert done[-1] == (result.bytes_sent, result.bytes_sent)
    with pytest.raises(VerificationError, match="does not verify"):
        door.publish(world.out, NAME, license="mit")  # made-up tensors


def test_a_second_publish_sends_no_weights(world: World) -> None:
    first = world.publish()
    assert first.bytes_sent > weight_bytes(world)
    sent = world.hub.bodies
    (world.out / "README.md").write_text("---\nlicense: mit\n---\n# Edited\n")
    again = world.publish()
    assert again.bytes_sent == (world.out / "README.md").stat().st_size
    assert again.bytes_skipped >= weight_bytes(world)
    assert world.hub.bodies == sent
    assert world.repo.parents[again.commit] == first.commit
    assert world.publish().commit == again.commit


def test_older_weights_go_and_the_rest_stays(world: World) -> None:
    kept = {"notes.md": b"n", "training_args.bin": b"t", "logs/run.txt": b"l"}
    stale = {"model.safetensors": b"s" * 300, "pytorch_model.bin": b"b", "a/old.gguf": b"g",
             "pytorch_model.bin.index.json": b"{}"}  # fmt: skip
    world.hub.create(NAME, kept | stale)
    result = world.publish()
    assert set(result.deleted) == stale.keys()
    assert kept.keys() <= world.repo.head().keys()
    assert world.is_published()
    assert len(world.repo.commits) == 2


def test_a_branch_is_made(world: World) -> None:
    world.hub.create(NAME, {"model.safetensors": b"main's"})
    result = world.publish(revision="alpha-1.5")
    assert world.repo.branches["alpha-1.5"] == result.commit
    assert world.is_published("alpha-1.5")
    assert set(world.repo.head()) == {".gitattributes", "model.safetensors"}


def test_a_pull_request(world: World) -> None:
    world.hub.create(NAME, {"model.safetensors": b"main's"})
    result = world.publish(create_pr=True)
    assert result.pull_request == f"{world.hub.url}/{NAME}/discussions/1"
    assert world.is_published("refs/pr/1")
    assert set(world.repo.head()) == {".gitattributes", "model.safetensors"}


@LFS
def test_a_pull_request_needs_a_repository(world: World) -> None:
    with pytest.raises(HubError, match="is not on the Hub: publish it without --create-pr first"):
        world.publish(create_pr=True)


def test_a_file_that_changes_after_the_verification(world: World) -> None:
    ready = world.prepare()
    shard = world.out / SHARDS[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    with pytest.raises(VerificationError, match=f"{SHARDS[1]} changed while it was published"):
        send(ready)
    assert set(world.repo.head()) == {".gitattributes"}
    shard.write_bytes(content)  # another time, the same content
    os.utime(shard, (1, 1))
    send(ready)
    assert world.is_published()


def test_a_small_file_that_changes_after_the_verification(world: World) -> None:
    ready = world.prepare()
    (world.out / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config.json changed while it was published"):
        send(ready)
    assert set(world.repo.head()) == {".gitattributes"}


@LFS
def test_a_link_leads_nowhere(world: World, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (world.out / "notes.png").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes.png is a link: put the file itself there"):
        world.publish()


def test_nothing_is_hashed_twice(world: World) -> None:
    """A file with the size and the time of before is taken for the same, so its hash is not taken again."""
    world.hub.create(NAME)
    ready = world.prepare()
    shard = world.out / SHARDS[1]
    status = shard.stat()
    shard.write_bytes(bytes(status.st_size))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    known = next(file.sha256 for file in ready.files if file.name == SHARDS[1])
    if world.hub.xet is not None:
        assert send(ready).files[SHARDS[1]] == known
        return
    with pytest.raises(HubError, match=f"{SHARDS[1]} to {NAME}: the Hub refuses what was sent"):
        send(ready)  # LFS looks at the content itself
    assert set(world.repo.head()) == {".gitattributes"}


def test_an_earlier_run_was_killed_before_its_commit(world: World) -> None:
    world.hub.create(NAME)
    world.hub.faults.append(Fault("/commit/", "cut", times=99))
    with pytest.raises(HubError):
        world.publish()
    sent = world.hub.bodies
    world.hub.faults.clear()
    world.publish()
    assert world.hub.bodies == sent
    assert world.is_published()


class _Killer(Fault):
    """Kills a process at its commit."""

    process: subprocess.Popen[bytes]

    def strikes(self, request: str) -> bool:
        if "/commit/" in request:
            self.process.kill()
        return False


@pytest.mark.slow
@LFS
def test_killed_and_run_again_it_goes_on(
    world: World, command: Callable[..., Ran], tmp_path: Path
) -> None:
    killer = _Killer("", 0)
    world.hub.faults.append(killer)
    environment = os.environ | {"HF_ENDPOINT": world.hub.url, "HF_HUB_DISABLE_XET": "1",
                                "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    line = [
        sys.executable,
        "-m",
        "expo",
        "publish",
        str(world.out),
        NAME,
        "--yes",
        "--license",
        "mit",
    ]
    killer.process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    assert killer.process.wait(300) == -signal.SIGKILL
    world.hub.faults.clear()
    sent = world.hub.bodies
    assert sent == (world.out / "model.safetensors").stat().st_size
    world.publish()
    assert world.hub.bodies == sent
    assert world.is_published()


def test_the_bar_moves_within_a_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_SECONDS", 0.001)
    seen: list[tuple[int, int]] = []
    result = send(world.prepare(), progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert seen[-1] == (result.bytes_sent, result.bytes_sent)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_how_far_a_file_was_read(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(100))
    assert watch.position(path) == 0
    with path.open("rb", buffering=0) as file:
        file.read(60)
        assert watch.position(path) == 60


@pytest.mark.parametrize("transport", ["xet"])
def test_what_xet_stores_is_the_model(world: World, tmp_path: Path) -> None:
    import hf_xet

    result = world.publish()
    assert world.hub.xet is not None
    by_sha256 = xet_hashes(world.hub.xet)
    back = tmp_path / "back"
    with get_xet_session().new_file_download_group(endpoint=f"local://{world.hub.xet}") as group:
        for name in SHARDS:
            info = hf_xet.XetFileInfo(
                by_sha256[result.files[name]], (world.out / name).stat().st_size
            )
            group.start_download_file(info, str(back / name))
    assert all((back / n).read_bytes() == (world.out / n).read_bytes() for n in SHARDS)


@LFS
def test_signed_addresses_reach_no_log(
    world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import traceback

    world.hub.faults.append(Fault("PUT", 500, times=99))
    with pytest.raises(HubError) as caught:
        world.publish()
    shown = "".join(traceback.format_exception(caught.value))
    assert "500" in shown
    assert SIGNATURE not in shown
    assert TOKEN not in shown
    written = "".join(capfd.readouterr())
    assert SIGNATURE not in written
    assert TOKEN not in written


@LFS
def test_offline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="may not be asked while HF_HUB_OFFLINE is set: unset it"):
        world.publish()


@LFS
@pytest.mark.parametrize(("flags", "words"), [
    ({"revision": "v2", "create_pr": True}, "--create-pr opens a pull request to main"),
])  # fmt: skip
def test_flags_that_contradict(world: World, flags: dict, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        world.prepare(**flags)
