"""A merge that goes to the Hub shard by shard: what comes to lie there is what a merge and a publication give, two
shards are on the disk at most, and whatever breaks, the branch holds the model or what it held, and no shard goes twice."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils._xet import get_xet_session
from safetensors.torch import load_file, save_file

import expo as door
from expo import disk
from expo.compute.stream import Tuning
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, ExpoError, HubError, SpecError, VerificationError
from expo.output.manifest import Manifest
from expo.planning.build import build_plan
from expo.publishing.repository import parse_target
from expo.results import PushPlan, PushResult
from expo.spec.request import make_request
from expo.threads import CREW
from expo.verbs.push import Publication, plan_push, push_plan

from .conftest import Ran, extrapolate, nudged, weights, write_checkpoint
from .hub_writing import Account, Blob, Fault, WritableHub
from .publishing import CLIENTS_OWN, LFS, NAME, TOKEN, World
from .xet_store import xet_hashes

pytestmark = CLIENTS_OWN

STAGING = ".org--model.expo-staging"
SHARDS = 6


@dataclass
class Pushing:
    """A pair whose merge has six shards, and the Hub that it goes to. The working directory is `place`."""

    world: World
    sft: Path
    aligned: Path
    place: Path

    @property
    def hub(self) -> WritableHub:
        return self.world.hub

    @property
    def staging(self) -> Path:
        return self.place / STAGING

    def push(self, **flags: object) -> PushResult:
        """Without the verification: these tensors are of no model."""
        how = {name: flags.pop(name) for name in ("revision", "create_pr") if name in flags}
        target = parse_target(NAME, **how)  # type: ignore[arg-type]
        where = Publication(target, **{"licence": "apache-2.0"} | flags)  # type: ignore[arg-type]
        plan = build_plan(make_request(str(self.sft), str(self.aligned), alpha=1.5))
        return push_plan(plan, where, verify=False, tuning=Tuning(threads=1))

    def head(self) -> dict[str, Blob]:
        return self.world.repo.head()

    def puts(self) -> Counter[str]:
        """How often which object was sent (LFS)."""
        return Counter(line for line in self.hub.asked() if line.startswith("PUT"))

    def is_whole(self) -> bool:
        """Whether the branch holds all that its manifest names, and the manifest is of this merge."""
        head = self.head()
        if "expo.json" not in head:
            return False
        manifest = Manifest.from_json(head["expo.json"].content or b"")
        shards = {name for name in manifest.files if name.endswith(".safetensors")}
        return len(shards) == SHARDS and all(
            name in head and head[name].sha256 in (None, sha256)
            for name, sha256 in manifest.files.items()
        )


@pytest.fixture
def pushing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pushing:
    sft = weights()
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", nudged(sft), shards=SHARDS)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr("expo.publishing.presentation.find_spec", lambda _: None)  # no picture
    return Pushing(world, tmp_path / "sft", tmp_path / "aligned", place)


def test_what_lies_there_is_what_a_merge_and_a_publication_give(
    pushing: Pushing, tmp_path: Path
) -> None:
    world = pushing.world
    shutil.rmtree(world.out)
    extrapolate(pushing.sft, pushing.aligned, world.out, alpha=1.5)
    published = world.publish()
    expected, store = pushing.head(), dict(pushing.hub.store)
    pushing.hub.repos.clear()
    pushing.hub.store.clear()
    if pushing.hub.xet is not None:
        shutil.rmtree(pushing.hub.xet)
    result = pushing.push()
    assert pushing.head() == expected
    assert pushing.hub.store == store
    assert result.receipt.files == published.files
    assert result.receipt.bytes_sent == published.bytes_sent
    assert result.merge.statistics.elements > 0
    assert world.repo.private
    assert list(pushing.place.iterdir()) == []
    if pushing.hub.xet is not None:
        assert_xet_holds(pushing.hub.xet, world.out, tmp_path / "back")


def assert_xet_holds(store: Path, out: Path, back: Path) -> None:
    """Every shard of `out`, by its hash."""
    import hf_xet

    by_sha256, files = xet_hashes(store), sorted(out.glob("*.safetensors"))
    named = Manifest.from_json((out / "expo.json").read_bytes()).files
    with get_xet_session().new_file_download_group(endpoint=f"local://{store}") as group:
        for path in files:
            info = hf_xet.XetFileInfo(by_sha256[named[path.name]], path.stat().st_size)
            group.start_download_file(info, str(back / path.name))
    assert [(back / p.name).read_bytes() for p in files] == [p.read_bytes() for p in files]


def test_a_second_push_sends_no_weights(pushing: Pushing) -> None:
    first = pushing.push()
    sent = pushing.hub.bodies
    again = pushing.push()
    assert (again.receipt.commit, again.receipt.bytes_sent) == (first.receipt.commit, 0)
    assert again.receipt.bytes_skipped == first.receipt.bytes_sent
    assert pushing.hub.bodies == sent
    assert max(pushing.puts().values(), default=1) == 1
    assert len(pushing.world.repo.commits) == 2


class _Watch(Fault):
    """Looks at the staging directory whenever a request that fits comes, when it has filled as far as it will."""

    staging: Path
    most = 0

    def strikes(self, request: str) -> bool:
        if re.search(self.pattern, request):
            for _ in range(20):
                self.most = max(self.most, len(shards_in(self.staging)))
                if self.most > 2:
                    break
                time.sleep(0.005)
        return False


def shards_in(folder: Path) -> list[str]:
    """Whole ones and those under way."""
    return [p.name for p in folder.iterdir() if p.name.endswith((".safetensors", ".partial"))]


def test_two_shards_are_on_the_disk_at_most(pushing: Pushing) -> None:
    watch = _Watch("PUT|xet-write-token", 0)
    watch.staging = pushing.staging
    pushing.hub.faults.append(watch)
    pushing.push()
    assert 1 <= watch.most <= 2


@LFS
def test_a_branch_and_a_pull_request(pushing: Pushing) -> None:
    pushing.hub.create(NAME, {"model.safetensors": b"main's", "notes.md": b"kept"})
    result = pushing.push(revision="alpha-1.5")
    assert pushing.world.repo.branches["alpha-1.5"] == result.receipt.commit
    assert set(pushing.head()) == {".gitattributes", "model.safetensors", "notes.md"}
    result = pushing.push(create_pr=True)
    assert result.receipt.pull_request == f"{pushing.hub.url}/{NAME}/discussions/1"
    again = pushing.push(create_pr=True)
    assert again.receipt.pull_request == result.receipt.pull_request
    assert max(pushing.puts().values()) == 1
    result = pushing.push()
    assert result.receipt.deleted == ("model.safetensors",)
    assert "notes.md" in pushing.head()


def stopped_at_the_commit(pushing: Pushing) -> None:
    """Everything was sent, nothing is committed."""
    pushing.hub.faults.append(Fault("/commit/", "cut", times=99))
    with pytest.raises(HubError, match=r"broke .*: run the same command again"):
        pushing.push()
    pushing.hub.faults.clear()
    assert set(pushing.head()) == {".gitattributes"}
    assert shards_in(pushing.staging) == []


def test_it_goes_on_without_the_shards(pushing: Pushing) -> None:
    stopped_at_the_commit(pushing)
    pushing.hub.requests.clear()
    pushing.push()
    assert pushing.is_whole()
    assert not pushing.puts()
    assert not any("xet-write-token" in line for line in pushing.hub.asked())
    assert not pushing.staging.exists()


def test_what_the_hub_dropped_is_made_again(pushing: Pushing) -> None:
    stopped_at_the_commit(pushing)
    before = pushing.puts()
    if pushing.hub.xet is None:
        dropped = next(iter(pushing.hub.store))
        del pushing.hub.store[dropped]
    else:
        dropped = ""
        shutil.rmtree(pushing.hub.xet)
    pushing.push()
    assert pushing.is_whole()
    assert pushing.puts() - before == Counter([f"PUT /lfs/{dropped}"] if dropped else [])


def test_another_merge_starts_afresh(pushing: Pushing, tmp_path: Path) -> None:
    stopped_at_the_commit(pushing)
    sft = weights(seed=3)
    shutil.rmtree(pushing.aligned)
    write_checkpoint(pushing.aligned, nudged(sft), shards=SHARDS)
    pushing.push()
    assert pushing.is_whole()
    expected = extrapolate(pushing.sft, pushing.aligned, tmp_path / "expected", alpha=1.5).out
    named = Manifest.from_json((expected / "expo.json").read_bytes()).files
    there = {name: blob.sha256 for name, blob in pushing.head().items() if blob.sha256}
    assert there == {name: named[name] for name in there}


@LFS
def test_a_lost_answer_to_the_commit(pushing: Pushing) -> None:
    pushing.hub.faults.append(Fault("/commit/", "lost"))
    result = pushing.push()
    assert result.receipt.commit == pushing.world.repo.branches["main"]
    assert len(pushing.world.repo.commits) == 2


class _Meddler(Fault):
    """Commits to the branch itself when a request comes."""

    world: World

    def strikes(self, request: str) -> bool:
        if re.search(self.pattern, request) and not self.seen:
            self.seen = 1
            self.world.repo.add("main", self.world.repo.head(), self.world.repo.branches["main"])
        return False


@pytest.mark.parametrize("moment", ["PUT|xet-write-token", "/commit/"])
def test_others_who_commit_meanwhile(pushing: Pushing, moment: str) -> None:
    pushing.hub.create(NAME, {"notes.md": b"kept"})
    meddler = _Meddler(moment, 0)
    meddler.world = pushing.world
    pushing.hub.faults.append(meddler)
    with pytest.raises(HubError, match="got other commits since it was looked at: run the same"):
        pushing.push()
    assert set(pushing.head()) == {".gitattributes", "notes.md"}
    pushing.push()
    assert pushing.is_whole()
    assert max(pushing.puts().values(), default=1) == 1


@LFS
def test_a_nan_in_an_input(pushing: Pushing) -> None:
    name = f"model-00004-of-0000{SHARDS}.safetensors"
    tensors = load_file(pushing.aligned / name)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, pushing.aligned / name, {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        pushing.push()
    assert set(pushing.head()) == {".gitattributes"}
    assert list(pushing.place.iterdir()) == []


def _read_only(pushing: Pushing) -> None:
    pushing.hub.accounts[TOKEN] = Account(role="read")


def _no_member(pushing: Pushing) -> None:
    pushing.hub.accounts[TOKEN] = Account(orgs=())


def _somebody_elses(pushing: Pushing) -> None:
    pushing.hub.create(NAME, owners=frozenset({"eve"}))


def _bad_front_matter(pushing: Pushing) -> None:
    (pushing.aligned / "README.md").write_text("---\npipeline_tag: 'license: nonsense'\n---\n")


@LFS
@pytest.mark.parametrize(("change", "flags", "words"), [
    (_read_only, {}, "for reading only: take one with write access"),
    (_no_member, {}, "ada is no member of org: name another ORG"),
    (_somebody_elses, {}, "ada has no write access to it"),
    (_bad_front_matter, {}, "its front matter is not valid"),
    (None, {"licence": None}, "the licence is not clear: the card of aligned names no licence; say"),
    (None, {"licence": "nonsense"}, "is no licence that expo knows"),
    (None, {"licence": "llama3"}, "wants a name that begins with Llama-3"),
    (None, {"licence": "llama3", "name_ok": True}, r"the aligned model has no LICENSE file, .*: merge into a directory, put it"),
    (None, {"create_pr": True}, "publish it without --create-pr first"),
])  # fmt: skip
def test_what_publish_would_refuse_is_refused_first(
    pushing: Pushing, change: Callable[[Pushing], None] | None, flags: dict, words: str
) -> None:
    if change:
        change(pushing)
    with pytest.raises(ExpoError, match=words):
        pushing.push(**flags)
    sent = {line for line in pushing.hub.asked() if not line.startswith("GET")}
    assert sent <= {"POST /api/validate-yaml"}
    assert list(pushing.place.iterdir()) == []


@LFS
def test_a_branch_that_keeps_weights_in_git(pushing: Pushing) -> None:
    pushing.hub.keeps_in_git = True
    with pytest.raises(HubError, match=r"would keep model-00001.* in git, not in LFS: add"):
        pushing.push()
    assert list(pushing.place.iterdir()) == []


def test_an_upload_that_fails_ends_the_merge(pushing: Pushing) -> None:
    if pushing.hub.xet is None:
        pushing.hub.faults.append(Fault("PUT", 500, number=2, times=999))
    else:
        pushing.hub.faults.append(Fault("xet-write-token", 403, number=2, times=999))
    others = set(threading.enumerate())
    with pytest.raises(HubError, match=r"model-00003.* to org/model: "):
        pushing.push()
    assert 1 <= len(shards_in(pushing.staging)) <= 2
    left = set(threading.enumerate()) - others
    assert CREW not in {thread.name for thread in left}  # a library's threads are its own matter
    pushing.hub.faults.clear()
    before = sum(pushing.puts().values())
    pushing.push()
    assert pushing.is_whole()
    if pushing.hub.xet is None:
        assert sum(pushing.puts().values()) - before == SHARDS - 2


def test_one_run_at_a_time(pushing: Pushing) -> None:
    stopped_at_the_commit(pushing)
    fd = disk.hold(pushing.staging, fcntl.LOCK_EX)
    assert fd is not None
    with pytest.raises(ExpoError, match="another run is writing"):
        pushing.push()
    os.close(fd)


def failure(pushing: Pushing) -> str | None:
    """The one line of a push that fails."""
    try:
        pushing.push()
    except HubError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "lost"])
def test_a_fault_in_any_request(pushing: Pushing, kind: str) -> None:
    pushing.push()
    asked = [line for line in pushing.hub.asked() if "harnesses" not in line]
    for number in range(len(asked)):
        pushing.hub.repos.clear()
        pushing.hub.store.clear()
        pushing.hub.faults[:] = [Fault(r"^(?!.*harnesses)", kind, number)]
        if said := failure(pushing):
            assert re.fullmatch(r"[^\n]{20,400}", said), said
            if NAME in pushing.hub.repos:
                assert len(pushing.world.repo.commits) <= 2
            pushing.hub.faults.clear()
            pushing.push()
        assert pushing.is_whole(), asked[number]
        assert len(pushing.world.repo.commits) == 2
        assert not pushing.staging.exists()


_RUN = """
import sys
from expo.compute.stream import Tuning
from expo.planning.build import build_plan
from expo.publishing.repository import parse_target
from expo.spec.request import make_request
from expo.verbs.push import Publication, push_plan
plan = build_plan(make_request(sys.argv[1], sys.argv[2], alpha=1.5))
push_plan(plan, Publication(parse_target("org/model"), licence="apache-2.0"), verify=False, say=print)
"""


class _Signal(Fault):
    """Sends a signal to a process when a request comes; with `holds` the answer waits until the process has ended."""

    process: "subprocess.Popen[str]"
    signal: int = signal.SIGKILL
    holds = False

    def strikes(self, request: str) -> bool:
        if super().strikes(request):
            self.process.send_signal(self.signal)
            if self.holds:
                self.process.wait(60)
        return False


def started(pushing: Pushing, hit: _Signal | None = None) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "HF_ENDPOINT": pushing.hub.url,
        "HF_HUB_DISABLE_XET": "1" if pushing.hub.xet is None else "0",
        "HF_HOME": str(pushing.place.parent / "home"),
    }
    line = [sys.executable, "-c", _RUN, str(pushing.sft), str(pushing.aligned)]
    if hit:
        pushing.hub.faults.append(hit)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    if hit:
        hit.process = process
    return process


@pytest.mark.slow
@pytest.mark.parametrize("moment", [
    "PUT|xet-write-token", "POST /verify|objects/batch|xet-write", "/commit/", "GET .*/tree/",
])  # fmt: skip
def test_killed_anywhere_it_goes_on_and_sends_no_shard_twice(pushing: Pushing, moment: str) -> None:
    resumed = 0
    for number in range(20):
        process = started(pushing, _Signal(moment, 0, number))
        _, err = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        pushing.hub.faults.clear()
        resumed += 1
    assert resumed
    assert pushing.is_whole()
    assert len(pushing.world.repo.commits) == 2
    assert max(pushing.puts().values(), default=1) == 1
    assert not pushing.staging.exists()


@pytest.mark.slow
@LFS
def test_an_interruption_does_not_wait_for_the_upload(pushing: Pushing) -> None:
    hit = _Signal("PUT", "cut", number=1)
    hit.signal, hit.holds = signal.SIGINT, True
    process = started(pushing, hit)
    _, err = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in err
    pushing.hub.faults.clear()
    again = started(pushing)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "resuming" in out
    assert pushing.is_whole()
    assert max(pushing.puts().values()) == 1


# The command line, with models that verify.


@pytest.fixture
def command(pushing: Pushing, expo: Callable[..., Ran]) -> Callable[..., Ran]:
    def run(*words: object) -> Ran:
        pair = (MODELS / "sft", MODELS / "aligned")
        return expo("extrapolate", *pair, *words, "--alpha", "1.5", verify=True)

    return run


@pytest.mark.slow
@LFS
def test_the_whole_way(pushing: Pushing, command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = command("hf://org/model", "--license", "mit", "--receipt", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    assert "out    org/model: verified, 0.20 MB" in ran.out
    assert "not checked, for they read the weights: largest, direction" in ran.err
    receipt = json.loads((tmp_path / "r.json").read_text())
    assert receipt["commit"] == pushing.world.repo.branches["main"]
    manifest = Manifest.from_json(pushing.head()["expo.json"].content or b"")
    assert manifest.verified
    again = command("org/model", "--push", "--license", "mit", "--json")
    shown = json.loads(again.out)
    assert shown["receipt"]["bytes_sent"] == 0
    assert shown["merge"]["out"] == "org/model"
    assert "zero-rows" in shown["unchecked"]
    assert list(pushing.place.iterdir()) == []


@LFS
def test_a_dry_run_sends_and_makes_nothing(pushing: Pushing, command: Callable[..., Ran]) -> None:
    ran = command("org/model", "--push", "--license", "mit", "--dry-run")
    assert ran.code == 0, ran.err
    assert f"works in   {pushing.staging}: 0.20 MB of weights at most, removed after the" in ran.out
    assert "sends      0.2" in ran.out
    shown = json.loads(
        command("org/model", "--push", "--license", "mit", "--dry-run", "--json").out
    )
    assert shown.keys() == {"merge", "publish", "staging", "staging_bytes"}
    assert "model.safetensors" in shown["publish"]["send"]
    assert list(pushing.place.iterdir()) == []
    assert not pushing.hub.repos
    refused = command("org/model", "--push", "--dry-run")
    assert (refused.code, refused.out) == (2, "")
    assert "the licence is not clear" in refused.err


@LFS
def test_the_room_that_a_push_needs(pushing: Pushing, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(make_request(str(pushing.sft), str(pushing.aligned), alpha=1.5))
    sizes = sorted(shard.file_bytes for shard in plan.shards)
    usage = shutil.disk_usage(pushing.place)._replace(free=plan.write_bytes - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    shown: PushPlan = plan_push(plan, Publication(parse_target(NAME), licence="mit"))
    assert shown.merge.ok
    assert shown.staging_bytes == sum(sizes[-2:])
    pushing.push()
    assert pushing.is_whole()
    usage = usage._replace(free=sum(sizes[-2:]) - 1)
    with pytest.raises(
        ExpoError, match=r"too full: .*; make room, or run it in a directory on ano"
    ):
        pushing.push()
    assert list(pushing.place.iterdir()) == []


@LFS
@pytest.mark.parametrize(("words", "said"), [
    (("org/model", "--push", "--overwrite"), "--overwrite: not with --push, whose commit replaces"),
    (("org/model", "--push", "--no-verify"), "--no-verify: not with --push, which commits only"),
    (("org/model", "--public"), "--public goes with --push"),
    (("org/model", "--license", "mit"), "--license goes with --push"),
    (("org/model", "--push", "--as-adapter"), "--push: not with --as-adapter"),
    (("model", "--push"), "model is not a Hub id: name it ORG/NAME"),
    (("org/model", "--push", "--receipt", "none/r.json"), "none/r.json cannot be written: name a"),
])  # fmt: skip
def test_flags_that_do_not_go(
    pushing: Pushing, command: Callable[..., Ran], words: tuple[str, ...], said: str
) -> None:
    ran = command(*words)
    assert ran.code in (1, 2)
    assert said in ran.err
    assert not pushing.hub.requests


@LFS
def test_specs_that_cannot_be_pushed(pushing: Pushing, expo: Callable[..., Ran]) -> None:
    one = (
        f"merge_method: expo\nbase_model: {pushing.sft}\n"
        f"models: [{{model: {pushing.aligned}, parameters: {{alpha: 1.5}}}}]\n"
    )
    Path("two.yml").write_text(f"name: first\n{one}---\n{one}")
    ran = expo("merge", "two.yml", "org/model", "--push", verify=True)
    assert "a push takes one document, the spec has 2: merge the earlier ones into dir" in ran.err
    with pytest.raises(SpecError, match="a push takes one document"):
        door.push("two.yml", "org/model")
    foreign = {"merge_method": "sce", "base_model": str(pushing.sft), "dtype": "float32",
               "models": [{"model": str(pushing.aligned)}]}  # fmt: skip
    with pytest.raises(SpecError, match="a push streams, and this merge takes mergekit's engine"):
        door.push(foreign, "org/model", license="mit")
    assert not any(line.startswith(("POST", "PUT")) for line in pushing.hub.asked())


def _spec(**more: object) -> dict:
    return {
        "merge_method": "expo",
        "base_model": str(MODELS / "sft"),
        "models": [{"model": str(MODELS / "aligned"), "parameters": {"alpha": 1.5}}],
    } | more


@pytest.mark.slow
@LFS
def test_what_does_not_verify_gets_no_commit(pushing: Pushing, expo: Callable[..., Ran]) -> None:
    spec = _spec(verify={"vectors": "openchat"})
    Path("spec.yml").write_text(json.dumps(spec))
    ran = expo("merge", "spec.yml", "org/model", "--push", "--license", "mit", verify=True)
    assert ran.code == 3
    assert re.search(r"^error vectors: .*; ", ran.err, re.M)
    last = ran.err.splitlines()[-1]
    assert last.startswith("expo: org/model got no commit, the model does not verify: ")
    assert last.endswith("or merge into a directory, mend it there and `expo publish` it")
    assert set(pushing.head()) == {".gitattributes"}
    sent = pushing.puts()
    with pytest.raises(VerificationError, match="org/model got no commit, the model does not ver"):
        door.push(spec, "org/model", license="mit")
    result = door.push(_spec(), "org/model", license="mit")  # the same merge, corrected
    assert result.merge.verified
    assert pushing.puts() == sent
    assert list(pushing.place.iterdir()) == [pushing.place / "spec.yml"]


@pytest.mark.slow
@LFS
def test_without_a_download_and_without_an_output(pushing: Pushing, tmp_path: Path) -> None:
    """Both ends on the Hub: no weights of the inputs on this disk, and one shard of the output at most."""
    hub = pushing.hub
    hub.repositories |= {f"org/{name}": MODELS / name for name in ("sft", "aligned")}
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
                                "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}  # fmt: skip
    flags = ("--alpha", "1.5", "--push", "--stream-inputs", "--license", "mit", "-q")
    line = [sys.executable, "-m", "expo", "extrapolate", "org/sft", "org/aligned", NAME, *flags]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    local = door.extrapolate(MODELS / "sft", MODELS / "aligned", tmp_path / "l", alpha=1.5).out
    expected = Manifest.from_json((local / "expo.json").read_bytes())
    assert pushing.head()["model.safetensors"].sha256 == expected.files["model.safetensors"]
    manifest = Manifest.from_json(pushing.head()["expo.json"].content or b"")
    assert manifest.sources["aligned"].model == "org/aligned"
    assert TOKEN not in ran.stdout + ran.stderr


@pytest.mark.slow
@LFS
def test_the_python_door(pushing: Pushing) -> None:
    told: list[tuple[int, int]] = []
    result = door.push(_spec(), NAME, license="mit", progress=lambda *now: told.append(now))
    assert result.receipt.commit == pushing.world.repo.branches["main"]
    assert (told, told[-1]) == (sorted(told), (result.merge.written_bytes,) * 2)


def test_a_tied_head_whose_values_are_gone_is_not_called_equal(tmp_path: Path) -> None:
    """What cannot be read is skipped, never passed."""
    from expo.checkpoint.files import open_remains
    from expo.checkpoint.headers import layout
    from expo.verification.check import GONE, run
    from expo.verification.run import CHECKS
    from expo.verification.subject import Subject, TensorFacts

    names = ("lm_head.weight", "model.embed_tokens.weight")
    config = {"tie_word_embeddings": True, "architectures": ["XForCausalLM"]}
    tensors = {name: torch.zeros(4, 4) for name in names}
    write_checkpoint(tmp_path, tensors, config=config)
    shard = tmp_path / "model.safetensors"
    header = layout([(name, "F32", (4, 4)) for name in names], {})[0]
    shard.unlink()
    files = open_remains(tmp_path, {shard.name: (header, len(header) + 128)})
    subject = Subject(files, tensor_facts=TensorFacts({}))
    checks = {check.name: check for check in CHECKS}
    found = run(checks["tied-weights"], subject)
    assert (found.status, found.message.startswith(GONE)) == ("skipped", True)
    assert run(checks["shards"], subject).status == "pass"
    assert run(checks["modes"], subject).status == "pass"
    with pytest.raises(CheckpointError, match=r"model.safetensors is no longer on this disk"):
        files.read(shard.name, len(header), len(header) + 8)
    with pytest.raises(CheckpointError, match=r"model.safetensors is no longer on this disk"):
        files.local_path(shard.name)
