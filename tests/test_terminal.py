"""Whatever a model, a spec or a flag holds: it shows on the terminal and does nothing there."""

import json
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from expo.checkpoint.shown import visible, without_secrets
from expo.cli.output import facts, table, to_json
from expo.cli.streams import crashed

from .conftest import Ran, extrapolate, nudged, weights

EVIL = (
    "$\\x$\x1b]0;OWNED\x07\x1b[31mOWNED\x1b[2J\rOWNED\x08\x7f\x00\x9b2J\x85"
    "\u200b\u200e\u202eOWNED\u2066\u2028\u2029\ufeff\u2060\u00ad\u3164\u2800\ufe0f\U000e0041"
)
"""A title, a colour, a cleared screen, a line written over, text turned round, and what nobody sees."""

NAME = EVIL.replace("\x00", "")  # as names of files and arguments are


def acting(text: str) -> set[str]:
    """What of a text would act on a terminal, or not be seen."""
    return {c for c in text if c not in "\n" and visible(c) != c}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A pseudo-terminal in the place of both streams; called, it tells what came out there."""
    master, slave = pty.openpty()
    came: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                came.append(os.read(master, 65536))
            except OSError:  # the other end is closed
                return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    stream = os.fdopen(slave, "w", encoding="utf-8")

    def said() -> str:
        stream.close()
        listener.join()
        return b"".join(came).decode()

    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    yield said
    stream.close()
    listener.join()
    os.close(master)


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Two models whose tensors, configs, files and templates are named by an attacker, their merge, an adapter,
    specs, prompts and results."""
    sft = {f"{name}{NAME}": tensor for name, tensor in weights().items()}
    _write(tmp_path / "sft", sft)
    _write(tmp_path / "aligned", nudged(sft))
    _write(tmp_path / "other", {f"{EVIL}{n}": torch.ones(2, 2) for n in range(2)})
    extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", alpha=1.5)
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    (tmp_path / "out" / "expo.json").write_text(json.dumps(_spoiled(manifest)))
    adapter = {"peft_type": EVIL, "base_model_name_or_path": EVIL, "r": 1, "target_modules": [EVIL]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({EVIL: torch.ones(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    spec = {
        "merge_method": "expo", "base_model": "sft", "models": [{"model": "aligned", "parameters": {"alpha": 1.5}}]
    }  # fmt: skip
    (tmp_path / "spec.yml").write_text(json.dumps(spec | {EVIL: EVIL}))
    (tmp_path / "method.yml").write_text(json.dumps(spec | {"merge_method": EVIL}))
    (tmp_path / "models.yml").write_text(
        json.dumps(spec | {"base_model": EVIL.replace("\x00", "")})
    )
    (tmp_path / "raw.yml").write_text(f"merge_method: expo{EVIL}\n")
    prompts = {"prompt": EVIL, EVIL: EVIL}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompts) + "\n" + EVIL)
    (tmp_path / "scores.json").write_text(json.dumps({"schema": EVIL, "results": [{EVIL: EVIL}]}))
    return tmp_path


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={EVIL: EVIL})
    config = {"model_type": EVIL, "architectures": [EVIL], "auto_map": {"AutoModel": f"{EVIL}.X"}}
    (folder / "config.json").write_text(json.dumps(config | {EVIL: EVIL, "torch_dtype": EVIL}))
    (folder / "generation_config.json").write_text(json.dumps({EVIL: EVIL, "eos_token_id": EVIL}))
    evil = NAME.replace("\\", "")  # which no file of a model may have
    for name in (f"LICENSE{evil}", f"{evil}.txt", f"{evil}.bin", f"{evil}.py"):
        (folder / name).write_text(EVIL)


_FIXED = ("schema", "files", "method", "engine", "rounding", "dtypes", "spec")


def _spoiled(value: object) -> object:
    """Every text of a manifest with the attack at its end, but for those that only a few words may be."""
    match value:
        case dict():
            return {key: item if key in _FIXED else _spoiled(item) for key, item in value.items()}
        case list():
            return [_spoiled(item) for item in value]
        case str():
            return f"{value}{EVIL}"
    return value


COMMANDS = {
    "diff": ("diff", "sft", "aligned", "-v"),
    "diff of others": ("diff", "sft", "other"),
    "spectrum": ("spectrum", "aligned", "--top", 50),
    "spectrum of a change": ("spectrum", "aligned", "--minus", "sft"),
    "verify": ("verify", "out", "--quick", "-v"),
    "verify against": ("verify", "other", "--against", "aligned", "-v"),
    "info": ("info", "out"),
    "plan": ("plan", "sft", "aligned", "--alpha", 1.5),
    "plan of others": ("plan", "sft", "other", "--alpha", 1.5),
    "plan of an adapter": ("plan", "sft", "sft+adapter", "--alpha", 1.5),
    "plan of a spec": ("plan", "spec.yml"),
    "plan of a method": ("plan", "method.yml"),
    "plan of models": ("plan", "models.yml"),
    "plan of no YAML": ("plan", "raw.yml"),
    "resolved": ("plan", "sft", "aligned", "--alpha", 1.5, "--allow-missing", NAME, "--resolved"),
    "filters": ("plan", "sft", "aligned", "--alpha", 1.5, "--allow-missing", NAME, "--include", NAME),
    "extrapolate": ("extrapolate", "sft", "aligned", "new", "--alpha", 1.5, "-v"),
    "over something else": ("extrapolate", "sft", "aligned", "other", "--alpha", 1.5, "--overwrite"),
    "card": ("card", "out"),
    "publish": ("publish", "out", "org/name", "--dry-run"),
    "extract-lora": ("extract-lora", "aligned", "--minus", "sft", "lora", "--rank", 1),
    "laser": ("laser", "sft", "cut", "--keep", "rank=2"),
    "sweep": ("sweep", "sft", "aligned", "--alphas", "1.0:1.2:0.1", "--prompts", "prompts.jsonl", "--reward", NAME),
    "evaluate": ("evaluate", "out", "--format", "alpaca-eval", "--prompts", "prompts.jsonl"),
    "compare": ("compare", "scores.json", "prompts.jsonl"),
    "a verb": (NAME,),
    "a flag": ("diff", f"--{NAME}", "a", "b"),
    "a value": ("diff", "sft", "aligned", "--top", NAME),
    "a choice": ("plan", "sft", "aligned", "--rounding", NAME),
    "a model": ("diff", NAME, f"org/{NAME}"),
    "a file": ("merge", f"{NAME}.yml", NAME),
    "a traceback": ("info", NAME, "--debug"),
    "help": ("sweep", "--help"),
}  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=[pytest.mark.slow] * name.startswith("verify"))
        for name, words in COMMANDS.items()
    ],
)
def test_nothing_from_outside_acts_on_a_pipe_or_a_terminal(
    words: tuple[object, ...],
    evil: Path,
    monkeypatch: pytest.MonkeyPatch,
    expo: Callable[..., Ran],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(evil)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = expo(*words)
    assert ran.out or ran.err
    assert not acting(ran.out + ran.err)
    terminal = request.getfixturevalue("terminal")
    expo(*words)
    said = terminal().replace("\r\n", "\n")
    assert not re.search("[\x1b\r\x9b][^O]{0,4}OWNED", said)
    ours = re.sub("\x1b\\[(31|0)m|(?<=\n)\r|^\r|\r(?=[^O])", "", said)  # errors are red, bars move
    assert not acting(ours)


def test_json_is_exact(
    evil: Path, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> None:
    monkeypatch.chdir(evil)
    ran = expo("diff", "sft", "other", "--json")
    assert not acting(ran.out)
    assert ran.out.isascii()
    assert f"{EVIL}0" in json.loads(ran.out)["missing"]
    assert json.loads(to_json({"α": EVIL})) == {"α": EVIL}


def test_a_printed_spec_says_the_same(expo: Callable[..., Ran], tmp_path: Path) -> None:
    """It may be kept in a file: what the stream would escape is written with YAML's escapes."""
    for name in (NAME, "模型-ü"):
        (tmp_path / name).mkdir()
    ran = expo(
        "extrapolate", tmp_path, tmp_path / NAME, tmp_path / "out", "--alpha", 1.5, "--print-spec"
    )
    assert not acting(ran.out)
    assert yaml.safe_load(ran.out)["models"][0]["model"].endswith(NAME)
    plain = expo(
        "extrapolate",
        tmp_path,
        tmp_path / "模型-ü",
        tmp_path / "out",
        "--alpha",
        1.5,
        "--print-spec",
    )
    assert "模型-ü" in plain.out


def test_a_crash_is_shown_as_an_error_is(capfd: pytest.CaptureFixture[str]) -> None:
    crashed(ValueError, ValueError(f"{EVIL}https://me:secret@host/x?token=secret"), None)
    said = capfd.readouterr().err
    assert not acting(said)
    assert "OWNED" in said
    assert "secret" not in said


@given(st.text())
def test_what_is_visible_does_nothing(text: str) -> None:
    assert not acting(visible(text))
    assert "\n" not in visible(text)
    assert visible(visible(text)) == visible(text)


def test_ordinary_letters_are_left_alone() -> None:
    for text in ("model.layers.0", "θ = α·Δ → ‖x‖ …", "naïve café", "日本語", "Привет", "🙂"):
        assert visible(text) == text
    assert visible("a\u202eb\x1b[2J\x9b") == r"a\u202eb\x1b[2J\x9b"


def test_lines_and_columns_hold_no_lines_of_their_own() -> None:
    """A name could write a verdict otherwise."""
    assert facts([("note", "a\nverified")]) == "note       a\\nverified"
    assert table(("a", "b"), [("x\ny", "1")]) == "a     b\nx\\ny  1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:pa@ss@host:80/a, again", "at https://***@host:80/a, again"),
        ("'http://hf_token@host'", "'http://***@host'"),
        ("url https://host/a?X-Sig=1&b=2: 403", "url https://host/a?… 403"),
        ("(https://host/a?token=1)", "(https://host/a?…"),
        ("proxy socks5://me:pw@host", "proxy socks5://***@host"),
        ("hf://gpt2@main and me@host", "hf://gpt2@main and me@host"),
        ("what? https://host/a@b", "what? https://host/a@b"),
    ],
)
def test_addresses_tell_no_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


SECRET = "https://me:secret@127.0.0.1:9"


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "org/sft", "org/aligned", "--alpha", 1.5),
        ("diff", "org/sft", "org/aligned", "--debug"),
        ("plan", "sft", "aligned", "--alpha", 1.5),
        ("plan", "sft", "aligned", "--alpha", 1.5, "--json"),
        ("publish", "out", "org/name", "--dry-run", "--debug", "--license", "mit"),
        ("evaluate", "--format", "jsonl", "--prompts", "prompts.jsonl", "--endpoint", SECRET),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_the_password_of_an_address_is_never_told(
    words: tuple[object, ...],
    evil: Path,
    monkeypatch: pytest.MonkeyPatch,
    expo: Callable[..., Ran],
) -> None:
    monkeypatch.chdir(evil)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", SECRET)
    (evil / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    ran = expo(*words)
    assert "secret" not in ran.out + ran.err
    if words[:3] == ("plan", "sft", "aligned") and "--json" not in words:
        assert "Hub endpoint: https://***@127.0.0.1:9 (not the default)" in ran.out
    if "org/sft" in words:
        assert "the Hub at https://***@127.0.0.1:9 does not answer" in ran.err
    if "--endpoint" in words:
        assert "the address of the server at 127.0.0.1:9 holds a name or a password" in ran.err


def test_cards_and_pictures_hold_nothing_that_acts(
    evil: Path, monkeypatch: pytest.MonkeyPatch, expo: Callable[..., Ran]
) -> None:
    """They are files: what makes them escapes by itself."""
    monkeypatch.chdir(evil)
    assert expo("card", "out", "--write").code == 0
    assert not acting((evil / "out" / "README.md").read_text())
    assert expo("diff", "sft", "aligned", "--plot", "delta.svg").code == 0
    assert not acting((evil / "delta.svg").read_text())
    assert expo("spectrum", "aligned", "--plot", "spectra.svg").code == 0
    assert not acting((evil / "spectra.svg").read_text())
