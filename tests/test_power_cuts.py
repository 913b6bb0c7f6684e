"""Whatever a power cut leaves, OUT is a whole model or absent, and the next run comes to the same bytes."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import expo as door
from expo import disk
from expo.compute.stream import Tuning
from expo.distribution import shared
from expo.distribution.share import Share
from expo.planning.build import build_plan
from expo.spec.request import make_request
from expo.verbs.join import join_plans

from .conftest import extrapolate, nudged, run_plan, write_checkpoint
from .crashes import Recording, cut
from .test_merge import digest

Digest = dict[str, str]

SPEC = """
merge_method: linear
name: half
models:
  - {model: sft, parameters: {weight: 0.5}}
  - {model: aligned, parameters: {weight: 0.5}}
---
merge_method: linear
models:
  - {model: half, parameters: {weight: 0.5}}
  - {model: aligned, parameters: {weight: 0.5}}
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A pair, in memory where the system has a place for that: files are made and synced by the thousand."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="power-cuts-", dir=memory) as folder:
        root = Path(folder)
        names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")
        tensors = {n: torch.full((4, 8), k / 8, dtype=torch.bfloat16) for k, n in enumerate(names)}
        write_checkpoint(root / "sft", tensors, shards=2)
        aligned = write_checkpoint(root / "aligned", nudged(tensors), shards=2)
        (aligned / "LICENSE").write_text("MIT")
        (aligned / "additional_chat_templates").mkdir()
        (aligned / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
        (root / "two.yml").write_text(SPEC)
        yield root


@dataclass(frozen=True)
class Case:
    """A run on `work/out`, and what is there before it."""

    before: Callable[[Path, Path], object] = lambda place, work: None
    overwrite: bool = False
    exchanges: bool = True
    is_mount: bool = False
    documents: bool = False
    shares: tuple[Share | None, ...] = ()
    out: str = "out"
    tuning: Tuning = field(default=Tuning(threads=1, chunk_bytes=1 << 14))

    def run(self, place: Path, work: Path) -> None:
        out = work / self.out
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(place)
            patched.setattr(shared, "_BEAT_SECONDS", 0.01)
            patched.setattr(shared, "_SILENT_SECONDS", 0.05)  # nobody else is at work
            if not self.exchanges:
                patched.setattr(disk, "exchange", lambda a, b: False)
            if self.is_mount:
                patched.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
            if self.documents:
                door.merge(place / "two.yml", out, verify=False, overwrite=self.overwrite)
                return
            plan = build_plan(make_request("sft", "aligned", alpha=1.5))
            how = {"overwrite": self.overwrite, "tuning": self.tuning}
            for share in self.shares:
                join_plans([plan], [out], share=share, **how)
            if not self.shares:
                run_plan(plan, out, **how)


def _older(place: Path, work: Path) -> None:
    """A model of other files: one shard, and a file more."""
    shutil.copytree(place / "aligned", place / "older", dirs_exist_ok=True)
    (place / "older" / "generation_config.json").write_text("{}")
    extrapolate(place / "sft", place / "older", work / "out", alpha=1.1, max_shard_bytes=10**6)


def _unfinished(place: Path, work: Path) -> None:
    """What an interrupted run of another plan has left."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("expo.output.staging.Staging.place", stop)
        with pytest.raises(KeyboardInterrupt):
            extrapolate(place / "sft", place / "aligned", work / "out", alpha=1.2)


def _empty(place: Path, work: Path) -> None:
    (work / "out").mkdir()


CASES = {
    "a new OUT": Case(out="deep/er/out"),
    "over an unfinished run": Case(before=_unfinished),
    "an empty directory": Case(before=_empty),
    "overwrite": Case(before=_older, overwrite=True),
    "overwrite, nothing exchanges": Case(before=_older, overwrite=True, exchanges=False),
    "overwrite a mount point": Case(before=_older, overwrite=True, is_mount=True),
    "several documents": Case(documents=True),
    "joined": Case(shares=(None,)),
    "two shares": Case(shares=(Share(1, 2), Share(0, 2), Share(1, 2))),
    "several documents over a model": Case(before=_older, overwrite=True, documents=True),
}


def replay(case: Case, place: Path, count: int, seed: int) -> None:
    work = place / "work"
    work.mkdir()
    case.before(place, work)
    old = _model(work / case.out)
    recording = Recording(work)
    with recording.running():
        case.run(place, work)
    new = _model(work / case.out)
    assert new not in (None, old)
    chance = random.Random(seed)
    last = len(recording.steps)
    for number in range(count):
        # half of all cuts hit the end, where the output takes its place
        at = chance.randrange(last + 1) if number % 2 else last - chance.randrange(min(60, last))
        state = cut(recording, chance, at).write_to(place / "state")
        where = f"cut {number} of seed {seed}, after step {at} of {last}"
        _check(case, place, state, (old, new), reads=number % 3 == 0, where=where)
        shutil.rmtree(state)


def _check(
    case: Case,
    place: Path,
    state: Path,
    models: tuple[Digest | None, Digest | None],
    *,
    reads: bool,
    where: str,
) -> None:
    out, new = state / case.out, models[1]
    found = _but_for_locks(_model(out))
    if found not in models:
        assert {".expo-new", ".expo-old"} & {entry.name for entry in out.iterdir()}, where
        assert not _loads(out) or _loaded(found) in map(_loaded, models), where
    if reads:
        with suppress(door.ExpoError) if found is None else nullcontext():
            door.info(out)
        assert _model(out) in models, where
    taken = _but_for_locks(_model(out)) == new and not case.overwrite
    with suppress(door.OutputError) if taken else nullcontext():
        case.run(place, state)
    assert _model(out) == new, where
    assert [entry.name for entry in out.parent.iterdir()] == ["out"], where


def _model(out: Path) -> Digest | None:
    """What a model consists of; None where there is nothing. Times of earlier documents differ between runs."""
    if not out.is_dir() or not any(e for e in out.iterdir() if e.name != ".expo-staging"):
        return None
    files = digest(out)
    files = {name: value for name, value in files.items() if not name.startswith(".expo-staging/")}
    if "expo.json" in files:
        try:
            manifest = json.loads((out / "expo.json").read_text())
        except ValueError:
            return files
        del manifest["inputs"], manifest["plan"]
        files["expo.json"] = json.dumps(manifest)
    return files


def _but_for_locks(model: Digest | None) -> Digest | None:
    """Without those that came along, which whoever looks next removes."""
    files = (model or {}).items()
    return {name: value for name, value in files if not name.startswith(".expo-claims/")} or None


def _loads(out: Path) -> bool:
    """Whether a loader would take it for a model."""
    names = {entry.name for entry in out.iterdir()}
    return "config.json" in names and bool(
        {"model.safetensors", "model.safetensors.index.json"} & names
    )


def _loaded(model: Digest | None) -> Digest:
    """What loaders look at."""
    files = (model or {}).items()
    return {name: value for name, value in files if not name.startswith((".expo", "expo.json"))}


@pytest.mark.parametrize("name", CASES)
def test_a_power_cut_loses_nothing(name: str, place: Path) -> None:
    replay(CASES[name], place, 12, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_thousand_power_cuts_lose_nothing(name: str, seed: int, place: Path) -> None:
    replay(CASES[name], place, 80, seed)
