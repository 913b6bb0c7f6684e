"""Files, specs and answers that mean harm: one line, exit 1 or 2, bounded, and nothing written."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from expo.checkpoint.checkpoint import read_shard
from expo.checkpoint.child import search
from expo.checkpoint.files import open_directory
from expo.checkpoint.front_matter import front_matter
from expo.checkpoint.hub import open_repository
from expo.checkpoint.parsing import parse_json, shown
from expo.checkpoint.reference import Location
from expo.checkpoint.vocabulary import read_vocabulary
from expo.errors import CheckpointError, ExpoError, HubError, SpecError

from . import hostile
from .conftest import Ran
from .hostile import SURE, Case
from .hub_server import COMMIT, Handler, Hub

_SEVERAL = ("spec", "vectors")
_HEAVY = ("5 MB", "many", "nested", "polynomial", "bomb", "billion", "deep", "memo", "4 GB", "digits", "ranges", "100,000", "huge numbers", "1 MB", "100 KB", "million", "laughs")  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.workplace(tmp_path_factory.mktemp("good"))


@pytest.fixture
def run(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> Callable[[Case], Ran]:
    """What the command says of a copy of the workplace that the case has spoiled; nothing may be added to it."""

    def ran(case: Case) -> Ran:
        folder = hostile.copied(good, tmp_path / "workplace")
        case.spoil(folder)
        monkeypatch.chdir(folder)
        before = _files(folder)
        found = expo(*case.words)
        assert _files(folder) == before
        return found

    return ran


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def _check(ran: Ran, name: str) -> None:
    lines = ran.err.splitlines()
    assert ran.code in (1, 2), ran
    assert "Traceback" not in ran.err
    assert len(lines) <= (13 if name.startswith(_SEVERAL) else 1)
    assert all(line.startswith("expo: ") and len(line) < 1000 for line in lines)
    assert lines or "refused" in ran.out


def _marked(name: str) -> object:
    heavy = any(word in name for word in _HEAVY)
    return pytest.param(name, marks=pytest.mark.slow if heavy else ())


@pytest.mark.parametrize("name", [_marked(name) for name in SURE])
def test_is_refused_in_one_line(name: str, run: Callable[[Case], Ran]) -> None:
    _check(run(SURE[name]), name)


@pytest.mark.parametrize(
    "words", [hostile.PAIR, hostile.ADAPTED, hostile.ROWS, hostile.PICKLED], ids=" ".join
)
def test_the_workplace_is_sound(words: tuple[str, ...], run: Callable[[Case], Ran]) -> None:
    ran = run(Case(lambda folder: None, words))
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
def test_damaged_bytes_never_end_in_a_traceback(
    seed: int, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> None:
    monkeypatch.chdir(hostile.copied(good, tmp_path / "workplace"))
    for name, case in hostile.drawn(seed, 40):
        hostile.copied(good, Path())
        case.spoil(Path())
        ran = expo(*case.words)
        assert ran.code in (0, 1, 2, 3), name
        assert all(line.startswith("expo: ") for line in ran.err.splitlines()) or ran.code in (
            0,
            3,
        ), (name, ran)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bin a bomb", "bin deep tuples as a key", "bin a memo of 16 GB", "bin a million numbers",
             "spec billion laughs", "vectors many aliases of a long text", "adapter regex nested",
             "adapter many patterns", "spec target polynomial", "header a shape of huge numbers"],
)  # fmt: skip
def test_is_bounded(name: str, good: Path, tmp_path: Path) -> None:
    """1 GB of memory, 10 s of the processor."""
    case = SURE[name]
    case.spoil(hostile.copied(good, tmp_path))
    limited = 'ulimit -d 1048576; ulimit -t 10; exec "$@"'
    command = ["bash", "-c", limited, "bash", sys.executable, "-m", "expo", *case.words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    _check(Ran(done.returncode, done.stdout, done.stderr), name)


STATES = {
    "plain": lambda t: t,
    "parameters": lambda t: {name: torch.nn.Parameter(tensor) for name, tensor in t.items()},
    "views of one storage": lambda t: {"a": t["model.norm.weight"][2:6], "b": t["model.norm.weight"][6:]},
    "one storage twice": lambda t: {"a": t["lm_head.weight"], "b": t["lm_head.weight"]},
    "dtypes": lambda t: {str(d): torch.ones(3, 2).to(d) for d in
                         (torch.float64, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.uint16)},
    "no element": lambda t: {"a": torch.ones(0, 3), "b": torch.ones(1, 5)[:, :1], "c": torch.tensor(1.0)},
    "of a module": lambda t: torch.nn.Linear(3, 2).state_dict(),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_the_layout_of_a_bin_is_torchs(name: str, good: Path, tmp_path: Path) -> None:
    from .conftest import weights

    state = STATES[name](weights())
    torch.save(state, tmp_path / "pytorch_model.bin")
    raw = (tmp_path / "pytorch_model.bin").read_bytes()
    shard = read_shard(open_directory(tmp_path), "pytorch_model.bin")
    assert {tensor.name for tensor in shard.tensors} == set(state)
    for info in shard.tensors:
        tensor = state[info.name].detach()
        assert info.shape == tuple(tensor.shape)
        held = raw[info.begin : info.begin + info.nbytes]
        assert held == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_pickle_runs_no_code(good: Path, tmp_path: Path, run: Callable[[Case], Ran]) -> None:
    assert "could run code, refused" in run(SURE["bin code"]).err
    assert not Path("was-run").exists()


def test_patterns_are_found_as_python_finds_them() -> None:
    assert search([r"\d+", "^b", "x"], ["a1", "b", "b2"]) == [
        frozenset({"a1", "b2"}), frozenset({"b", "b2"}), frozenset(),
    ]  # fmt: skip
    assert search([], ["a"]) == []
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing"):
        search(["a", "("], ["a"])


@pytest.mark.slow
def test_a_pattern_that_never_ends_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\(a\+\)\+b' does not come to an end on these names"):
        search(["a", "(a+)+b"], ["a" * 40])


@pytest.mark.parametrize("name", hostile.YAML)
def test_what_a_card_says_is_read_within_limits(name: str) -> None:
    raw = hostile.YAML[name]
    said = front_matter(
        f"---\n{raw if isinstance(raw, str) else raw.decode(errors='replace')}\n---\n"
    )
    assert said is None or isinstance(said, dict)


def test_what_the_largest_tokenizers_hold_is_read() -> None:
    wide = json.dumps({"vocab": {f"token {n}": n for n in range(30_000)}}).encode()
    assert parse_json(wide) == json.loads(wide)
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": NaN}')["a"] == "\U0001f600"  # type: ignore[index]


LIMITS = {
    "half of a character": b'"\\ud800"', "nested deeper than 100 levels": b"[" * 101 + b"]" * 101,
    "nested too deep": b"[" * 100_000, "at most 4000000 are read": b"[" + b"0," * 4_000_000 + b"0]",
    "can't decode": b'"\xff"',
}  # fmt: skip


@pytest.mark.parametrize("message", LIMITS)
def test_json_beyond_the_limits(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(LIMITS[message])
    assert parse_json(b"[" * 99 + b"]" * 99)


def test_a_value_is_shown_short() -> None:
    assert shown("x" * 10**6) == "'" + "x" * 37 + "..." + "x" * 38 + "'"
    assert len(shown([["x" * 1000] * 1000] * 1000)) < 2000
    assert len(shown(10**10_000)) < 100


def test_messages_are_lines_of_bounded_length() -> None:
    long = str(ExpoError("what: " + "x\n" * 10**6 + " cure"))
    assert len(long) < 1000
    assert (long[:8], long[-5:], long.count("\n")) == ("what: x\\", " cure", 0)
    several = str(SpecError(*["y" * 5000] * 50)).splitlines()
    assert len(several) == 13
    assert max(map(len, several)) < 310
    assert several[-1] == "and 38 more"
    assert str(SpecError("one", "two")) == "one\ntwo"


def test_two_tokens_of_one_id_are_named(good: Path, run: Callable[[Case], Ran]) -> None:
    assert run(SURE["vocabulary one id twice"]).err == (
        "expo: wide/vocab.json is damaged (id 0 belongs to two tokens, a and b): download it again\n"
    )


def test_a_whole_sentencepiece_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(hostile.PIECES + hostile.TRAINER)
    found = read_vocabulary(open_directory(tmp_path))
    assert found == dict(enumerate([*hostile.TOKENS, "<a>", "<b>"]))


@dataclass
class Lying(Hub):
    """Says of every repository what it was told to."""

    answer: bytes = b""

    def handler(self) -> type[Handler]:
        lying = self

        class Liar(Handler):
            def _answer(self, *, body: bool) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(lying.answer)))
                self.end_headers()
                self.wfile.write(lying.answer)

        return Liar


def _repository(**more: object) -> bytes:
    sibling = {"rfilename": "config.json", "size": 3} | more
    return json.dumps({"id": "org/x", "sha": COMMIT, "siblings": [sibling]}).encode()


LIES = {
    "not JSON": (b"<html>", "no description of a repository"),
    "nothing": (b"", "no description of a repository"),
    "a list": (b"[1]", "no description of a repository"),
    "null": (b"null", "no description of a repository"),
    "deep": (b"[" * 100_000, "no description of a repository"),
    "no id": (b"{}", "no description of a repository"),
    "siblings of numbers": (b'{"id": "org/x", "siblings": [1]}', "no description of a repository"),
    "no commit": (b'{"id": "org/x", "siblings": []}', "the commit None"),
    "a path for a commit": (b'{"id": "org/x", "sha": "../../x", "siblings": []}', "the commit '../../x'"),
    "sizes as text": (_repository(size="3"), "the size '3' of config.json"),
    "a size below 0": (_repository(size=-3), "the size -3 of config.json"),
    "a huge size": (_repository(size=10**400), "the size 1000000"),
    "a hash": (_repository(lfs={"sha256": "../x", "size": 3, "pointerSize": 1}), "a hash of config.json that is no SHA-256"),
    "a folder": (_repository(rfilename="LICENSE/"), "is no path below its folder: 'LICENSE/'"),
    "up": (_repository(rfilename="additional_chat_templates/../../x"), "is no path below its folder: 'additional_chat"),
    "the root": (_repository(rfilename="/etc/x"), "is no path below its folder: '/etc/x'"),
    "a backslash": (_repository(rfilename="a\\..\\x"), "holds a character that no name should"),
    "a null byte": (_repository(rfilename="a\0"), "holds a character that no name should"),
    "long": (_repository(rfilename="a" * 5000), "is too long for a name"),
    "half a character": (_repository(rfilename="a\ud800"), "is not UTF-8 text"),
    "a number": (_repository(rfilename=7), "is no name: 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_hub_that_lies_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, message = LIES[name]
    hub = Lying(answer=answer)
    server = hub.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError) as caught:
        open_repository(Location(repo_id="org/x"))
    server.shutdown()
    server.server_close()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_configuration_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "vocab.json").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(CheckpointError, match="has 10000000000 bytes, at most"):
        read_vocabulary(open_directory(tmp_path))
