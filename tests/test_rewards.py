"""Reward models: every token of a conversation counts, whatever is beside it in the batch."""

import json
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
