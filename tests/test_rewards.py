"""Reward models: every token of a conversation counts, whatever is beside it in the batch."""

import json
import sys
from pathlib import Path

import pytest
import torch

from expo.demo.toy import MODELS, answer, words
from expo.errors import CheckpointError, SpecError
from expo.sampling.rewards import identity, label, open_reward

ASKED = [[{"role": "user", "content": word[: 1 + n % 5]}] for n, word in enumerate(words(9, 1))]
ANSWERS = [answer("ok", word * (n % 3)) for n, word in enumerate(words(9, 2))]


def classifier(folder: Path, *, labels: int = 1, **changes: object) -> Path:
    """A reward model of the toy's vocabulary; `changes` go to its config and its tokenizer's."""
    from transformers import AutoTokenizer, MistralConfig, MistralForSequenceClassification

    torch.manual_seed(0)
    config = MistralConfig.from_pretrained(MODELS / "aligned", num_labels=labels, dtype="float32")
    MistralForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODELS / "aligned").save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))
    return folder


def alone(folder: Path) -> list[float]:
    """What the model says of each conversation by itself, without any padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    values = []
    for asked, reply in zip(ASKED, ANSWERS, strict=True):
        whole = [*asked, {"role": "assistant", "content": reply}]
        ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        with torch.no_grad():
            values.append(float(model(torch.tensor([ids])).logits))
    return values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding_side": "left"},
        {
            "pad_token_id": 2,
            "pad_token": "</s>",
        },  # the end of a turn, as Starling-beta's reward has it
        {"pad_token_id": None, "pad_token": None},
    ],
    ids=["right", "left", "pad is the end", "no pad"],
)
def test_a_batch_says_what_each_says_alone(tmp_path: Path, changes: dict) -> None:
    folder = classifier(tmp_path / "rm", **changes)
    wanted = alone(folder)
    assert len(set(wanted)) > 5
    for batch_size in (1, 4, 9):
        found = open_reward(str(folder), batch_size=batch_size)(ASKED, ANSWERS)
        assert found == pytest.approx(wanted, abs=1e-5)


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    folder = classifier(tmp_path / "rm", max_position_embeddings=16)
    reward = open_reward(str(folder), say=said.append)
    reward(ASKED, ANSWERS)
    assert "reads 16 tokens" in said[0]
    assert "of 9 conversations are longer" in said[0]
    reward(ASKED, ANSWERS)
    assert len(said) == 1  # not once a batch


def test_a_model_that_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no reward model: it has no score\.weight"):
        open_reward(str(MODELS / "aligned"))
    with pytest.raises(CheckpointError, match="gives 3 numbers, a reward is one"):
        open_reward(str(classifier(tmp_path / "three", labels=3)))
    folder = classifier(tmp_path / "rm")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no chat template; name one, or module:function"):
        open_reward(str(folder))
    with pytest.raises(SpecError, match="neither an existing directory nor a Hub id"):
        open_reward("nowhere")


def test_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text(
        "def longest(conversations, answers):\n    return [len(a) for a in answers]\n"
        "def few(conversations, answers):\n    return [1.0]\n"
        "def unclear(conversations, answers):\n    return [float('nan') for a in answers]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert open_reward("my_own_reward:longest")(ASKED, ANSWERS) == [len(a) for a in ANSWERS]
    with pytest.raises(SpecError, match="gave 1 numbers for 9 answers"):
        open_reward("my_own_reward:few")(ASKED, ANSWERS)
    with pytest.raises(SpecError, match="gave nan for the answer 'ok"):
        open_reward("my_own_reward:unclear")(ASKED, ANSWERS)
    with pytest.raises(SpecError, match="my_own_reward has no function none"):
        open_reward("my_own_reward:none")
    with pytest.raises(SpecError, match=r"No module named 'no_such': run where no_such\.py lies"):
        open_reward("no_such:none")


FUNCTIONS = """
import asyncio
import functools
import os
import sys
import numpy as np
import torch
print("noise")
def none(c, a): return None
def one(c, a): return 1.0
def words(c, a): return ["good"] * len(a)
def nones(c, a): return [None] * len(a)
def huge(c, a): return [10**400] * len(a)
def pairs(c, a): return np.zeros((len(a), 2))
def raises(c, a): raise RuntimeError("boom\\nand more")
def leaves(c, a): raise SystemExit(3)
def short(a): return [1.0]
def array(c, a): return np.arange(len(a))
def column(c, a): return torch.arange(len(a), dtype=torch.bfloat16, requires_grad=False)[:, None]
def graph(c, a): return torch.arange(len(a)) * torch.ones(1, requires_grad=True)
def given(c, a): return (float(n) for n in range(len(a)))
def named(c, a): return {f"{n}": 1.0 for n in range(len(a))}
def letters(c, a): return "1" * len(a)
def digits(c, a): return ["1"] * len(a)
def heap(c, a): return {*range(len(a))}
def large(c, a): return [1e200] * len(a)
def cancelled(c, a): raise asyncio.CancelledError
def late(c, a):
    yield 1.0
    raise OSError("gone")
def process(c, a):
    print("noise", flush=True)
    os.system("echo noise")
    yield from range(len(a))
def saved(c, a):
    print("noise", flush=True)
    print("noise", file=sys.__stdout__)
    return range(len(a))
def prints(c, a):
    print("noise")
    return range(len(a))
def changes(c, a):
    for messages, answer in zip(c, a):
        messages[0]["content"] = "changed"
        messages.append({"role": "assistant", "content": answer})
    a.clear()
    return range(len(c))
class Judge:
    def __call__(self, c, a): return range(len(a))
judge, part = Judge(), functools.partial(prints)
"""

NO_REWARDS = {
    "none": "gave None: give a number for each answer",
    "one": "gave 1.0: give a number for each",
    "words": r"gave \['good', .*: give a number",
    "nones": r"gave \[None, ",
    "huge": "gave .*…: give a number",
    "pairs": r"gave array\(",
    "named": r"gave \{'0': 1.0.*: give a number",
    "letters": "gave '111111111': give a number",
    "digits": r"gave \['1', .*: give a number",
    "heap": r"gave \{0, 1.*: give a number",
    "large": "gave 1e\\+200 for the answer 'ok .*: give numbers up to 3.4e\\+38",
    "cancelled": "failed: CancelledError",
    "late": "failed: OSError: gone",
    "raises": "failed: RuntimeError: boom and more; --debug shows where",
    "leaves": "failed: SystemExit: 3",
    "short": r"failed: TypeError: short\(\) takes 1",
}


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "many_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "many_rewards"


@pytest.mark.parametrize("name", NO_REWARDS)
def test_a_function_that_gives_no_rewards_is_named(name: str, functions: str) -> None:
    with pytest.raises(SpecError, match=f"reward {functions}:{name} {NO_REWARDS[name]}") as raised:
        open_reward(f"{functions}:{name}")(ASKED, ANSWERS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["array", "column", "graph", "given", "prints", "changes", "judge", "part"]
)
def test_whatever_numbers_come_in(
    name: str, functions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed is no data, and what a function does to its arguments is its own affair."""
    sys.modules.pop(functions, None)
    before = json.dumps([ASKED, ANSWERS])
    assert open_reward(f"{functions}:{name}")([tuple(one) for one in ASKED], ANSWERS) == [*range(9)]
    assert json.dumps([ASKED, ANSWERS]) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("noise\n")
    assert "many_rewards.py" in identity(f"{functions}:{name}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def f(:", "cannot be imported: SyntaxError: "),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        (
            "import none_such",
            "cannot be imported: ModuleNotFoundError: No module named 'none_such'",
        ),
        ("raise SystemExit('no')", "cannot be imported: SystemExit: no"),
    ],
)
def test_a_module_that_does_not_import(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError, match=f"reward broken_reward:f: broken_reward {message}"):
        open_reward("broken_reward:f")


@pytest.mark.parametrize("name", ["process", "saved"])
def test_nothing_that_is_printed_is_data(
    name: str, functions: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not of a child process either, nor of a stream that was kept."""
    assert open_reward(f"{functions}:{name}")(ASKED, ANSWERS) == [*range(9)]
    print("data")
    printed = capfd.readouterr()
    assert printed.out == "data\n"
    assert printed.err.count("noise") >= (2 if name == "process" else 1)


def test_modules_that_a_reward_imports_are_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its folder; within functions and packages too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "rating"
    package.mkdir()
    files = {
        tmp_path / "rater.py": "import json, rating.scale\ndef f(c, a):\n    import later\n",
        tmp_path / "later.py": "",
        tmp_path / "other.py": "",
        package / "__init__.py": "",
        package / "scale.py": "from .table import ROWS\nfrom . import rows",
        package / "table.py": "ROWS = 1",
        package / "rows.py": "",
    }
    for file, text in files.items():
        file.write_text(text)
    found = identity("rater:f")
    names = {word for word in found.split() if word.endswith(".py")}
    assert names == {file.name for file in files} - {"other.py"}
    (package / "table.py").write_text("ROWS = 2.0")
    assert identity("rater:f") != found


def test_names_that_have_no_file(tmp_path: Path) -> None:
    assert identity("builtins:len") == "builtins:len"
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "gone").symlink_to("/nowhere")
    assert identity(str(tmp_path / "rm")) == "rm []"


def test_a_reward_is_told_from_a_changed_one(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "rm")
    before = identity(str(folder))
    (folder / "config.json").write_text("{}")
    assert identity(str(folder)) != before
    assert identity("org/name@abc") == "org/name@abc"
    assert "toy.py" in identity("expo.demo.toy:preferred")
    assert str(tmp_path) not in identity(str(folder))
    assert label(str(folder)) == "rm"
    assert label("expo.demo.toy:preferred") == "expo.demo.toy:preferred"
