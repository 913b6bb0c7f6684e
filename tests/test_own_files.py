"""What expo has written is input too: a damaged manifest or journal is one line or a fresh start, never a traceback."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import expo as door
from expo.compute.stream import Tuning
from expo.output.manifest import Manifest, is_whole
from expo.output.staging import Staging
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.spec.request import make_request

from .conftest import Pair, Ran, run_plan
from .test_merge import digest

STAGING = ".out.expo-staging"

VALUES: tuple[object, ...] = (
    None, True, 0, -1, 2**70, 1.5, 1e308, float("nan"), float("-inf"), "", "x", "../../etc/passwd", "/etc/passwd",
    "a\\b", "\0", "\x1b[31m", "\u202e", "y" * 100_000, [], {}, [[]], {"": None}, [None] * 1000,
)  # fmt: skip


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value inside of a JSON value."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def altered(value: dict, chance: random.Random) -> object:
    """A JSON value with one thing changed: a value, a key that is gone, one that is new."""
    changed = copy.deepcopy(value)
    *above, last = chance.choice(list(places(changed)))
    home = changed
    for key in above:
        home = home[key]
    match chance.randrange(4):
        case 0:
            del home[last]
        case 1 if isinstance(home, dict):
            home[str(chance.choice(VALUES))[:1000]] = home.pop(last)
        case _:
            home[last] = copy.deepcopy(chance.choice(VALUES))
    return changed


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """Bytes cut off, flipped, put in or replaced as a whole."""
    at = chance.randrange(len(raw))
    whole = (
        b"",
        b"\0",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 10_000,
    )
    match chance.randrange(5):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
        case 2:
            return raw[:at] + chance.randbytes(chance.randrange(1, 50)) + raw[at:]
        case 3:
            return raw[:at] + bytes(len(raw) - at)
        case _:
            return chance.choice(whole)


def one_line(error: Exception) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) <= 1000, text[:200]
    assert text.isprintable(), text


@pytest.fixture
def plan(pair: Pair) -> Plan:
    return build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))


@pytest.fixture
def model(plan: Plan, tmp_path: Path) -> Path:
    return run_plan(plan, tmp_path / "whole").out


@pytest.fixture
def unfinished(plan: Plan, tmp_path: Path) -> Path:
    """A staging directory with all but the placement done; its journal is still there."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Staging, "place", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tmp_path / "out", tuning=Tuning(threads=1))
    return (tmp_path / STAGING).rename(tmp_path / "unfinished")


def read_manifests(model: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    raw = (model / "expo.json").read_bytes()
    refused = 0
    for number in range(count):
        if number % 2:
            content = json.dumps(altered(json.loads(raw), chance)).encode()
        else:
            content = damaged(raw, chance)
        (model / "expo.json").write_bytes(content)
        for verb in (door.info, door.card):
            try:
                verb(model)
            except door.ExpoError as error:
                one_line(error)
                refused += 1
    assert refused > count / 2


def resume(unfinished: Path, plan: Plan, count: int, seed: int) -> None:
    chance = random.Random(seed)
    place = unfinished.parent
    expected = digest(run_plan(plan, place / "expected").out)
    lines = (unfinished / "journal.jsonl").read_bytes()
    manifest = (unfinished / "expo.json").read_bytes()
    for number in range(count):
        shutil.copytree(unfinished, place / STAGING)
        if number % 2:
            (place / STAGING / "expo.json").unlink()
            (place / STAGING / "journal.jsonl").write_bytes(damaged(lines, chance))
        else:
            kinds: list[Callable[[], bytes]] = [
                lambda: damaged(manifest, chance),
                lambda: json.dumps(altered(json.loads(manifest), chance)).encode(),
            ]
            (place / STAGING / "expo.json").write_bytes(chance.choice(kinds)())
        run_plan(plan, place / "out", tuning=Tuning(threads=1))
        found, known = digest(place / "out"), Manifest.of_folder(place / "out")
        assert known is not None
        assert is_whole(place / "out", known)
        if number % 2:
            assert found == expected
        else:  # figures may be others, the model is not
            assert {n: h for n, h in found.items() if n not in ("expo.json", "README.md")} == {
                n: h for n, h in expected.items() if n not in ("expo.json", "README.md")
            }
        assert not (place / STAGING).exists()
        shutil.rmtree(place / "out")


def test_a_damaged_manifest_is_one_line(model: Path) -> None:
    read_manifests(model, 40, seed=0)


def test_a_damaged_journal_or_staged_manifest_costs_time_and_nothing_else(
    unfinished: Path, plan: Plan
) -> None:
    resume(unfinished, plan, 16, seed=0)


@pytest.mark.slow
def test_hundreds_of_damaged_files(model: Path, unfinished: Path, plan: Plan) -> None:
    read_manifests(model, 300, seed=1)
    resume(unfinished, plan, 200, seed=1)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file: Invalid JSON"),
        (b"\xff\xfe", "the file: Invalid JSON"),
        (b"[" * 10_000, "the file: Invalid JSON: recursion limit exceeded"),
        (b"[]", "the file: "),
        (b"{}", "plan: Field required"),
    ],
)
def test_the_message_says_where(
    content: bytes, told: str, model: Path, expo: Callable[..., Ran]
) -> None:
    (model / "expo.json").write_bytes(content)
    for verb in ("info", "card"):
        ran = expo(verb, model)
        assert ran.code == 1
        assert ran.err.startswith(f"expo: {model}: expo.json is damaged: {told}")
        assert ran.err.count("\n") == 1


@pytest.mark.parametrize("key", ["paper_alpha", "sources"])
def test_what_does_not_fit_together_is_damaged(key: str, model: Path) -> None:
    manifest = json.loads((model / "expo.json").read_text())
    (model / "expo.json").write_text(
        json.dumps(manifest | {key: {"paper_alpha": None}.get(key, {})})
    )
    for verb in (door.info, door.card):
        with pytest.raises(door.CheckpointError, match=r"expo\.json is damaged: "):
            verb(model)


@pytest.mark.slow
def test_verify_of_a_damaged_manifest_is_a_finding(model: Path) -> None:
    raw = (model / "expo.json").read_bytes()
    for seed in range(2):
        (model / "expo.json").write_bytes(damaged(raw, random.Random(seed)))
        found = door.verify(model, quick=True)
        assert not found.ok
        assert "error" in [check.status for check in found.checks if check.name == "manifest"]


def test_a_manifest_lists_files_of_its_folder_only(model: Path) -> None:
    manifest = json.loads((model / "expo.json").read_text())
    for name in ("../secret", "/etc/passwd", "a/../../b", "a//b", "a\0b", ""):
        changed = manifest | {"files": manifest["files"] | {name: "0" * 64}}
        (model / "expo.json").write_text(json.dumps(changed))
        with pytest.raises(door.CheckpointError, match="which is no file of its folder"):
            door.info(model)


def test_what_is_no_file_or_too_large_is_not_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo.output.manifest._MOST_BYTES", 1000)
    with pytest.raises(
        door.CheckpointError, match=r"cannot be read: \d+ bytes are more than expo writes"
    ):
        door.info(model)
    (model / "expo.json").unlink()
    (model / "expo.json").mkdir()
    with pytest.raises(door.CheckpointError, match="cannot be read: it is no file"):
        door.info(model)


@pytest.mark.parametrize("change", ["older", "damaged", "gone"])
def test_a_fresh_start_is_said(change: str, unfinished: Path, plan: Plan) -> None:
    out = unfinished.parent / "out"
    staging = unfinished.rename(out.with_name(STAGING))
    journal = staging / "journal.jsonl"
    (staging / "expo.json").write_text('{"torn')
    lines = journal.read_bytes().splitlines()
    match change:
        case "older":  # as they were without hashes
            journal.write_bytes(b"".join(line[16:] + b"\n" for line in lines))
        case "damaged":
            journal.write_bytes(journal.read_bytes().replace(b"sft", b"SFT", 1))
        case "gone":
            journal.unlink()
    said: list[str] = []
    run_plan(plan, out, say=said.append)
    assert said == ["what an unfinished run left cannot be read: starting afresh"]
