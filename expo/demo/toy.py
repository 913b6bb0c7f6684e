"""The toy task: a prompt of five letters, an answer that is a judgement and a copy of them.

Prompt `u:hello`, answer `ok hello`, `no hello` or `um hello`. SFT teaches 30 % ok, 40 % no, 30 % um;
alignment prefers ok. The reward of a model is the exact probability of `ok`, the copied word and
the end of the turn, averaged over held-out words: no sampling, no noise.
"""

import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = Path(__file__).parent / "models"
JUDGEMENTS = {"ok": 0.3, "no": 0.4, "um": 0.3}
HELD_OUT = 64
_HELD_OUT_SEED = 20240426


def words(count: int, seed: int) -> list[str]:
    """Random five-letter words."""
    generator = random.Random(seed)
    return ["".join(generator.choices(string.ascii_lowercase, k=5)) for _ in range(count)]


def answer(judgement: str, word: str) -> str:
    return f"{judgement} {word}"


def load(folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model of the toy in float32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode(
    tokenizer: "PreTrainedTokenizerBase", word: str, reply: str
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt (with the generation prompt), and of the reply with its end."""
    messages = [{"role": "user", "content": word}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    end = tokenizer.convert_tokens_to_ids(["</s>"])
    return [*prompt], [*tokenizer.encode(reply, add_special_tokens=False), *end]  # pyright: ignore


def log_probability(
    model: "PreTrainedModel", pairs: list[tuple[list[int], list[int]]]
) -> "torch.Tensor":
    """log p(reply | prompt), one value a pair. All pairs have the same lengths."""
    import torch

    ids = torch.tensor([prompt + reply for prompt, reply in pairs])
    start = len(pairs[0][0])
    scores = model(ids).logits[:, start - 1 : -1].float().log_softmax(-1)
    return scores.gather(-1, ids[:, start:, None]).squeeze(-1).sum(-1)


def reward(folder: Path) -> float:
    """The mean probability of the preferred answer over the held-out words."""
    import torch

    model, tokenizer = load(folder)
    pairs = [encode(tokenizer, w, answer("ok", w)) for w in words(HELD_OUT, _HELD_OUT_SEED)]
    with torch.no_grad():
        return float(log_probability(model, pairs).exp().mean())


def preferred(
    conversations: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str]
) -> list[float]:
    """1 for the preferred answer to a word, else 0: a reward for `expo sweep`."""
    asked = [conversation[-1]["content"] for conversation in conversations]
    return [float(a == answer("ok", word)) for word, a in zip(asked, answers, strict=True)]


def copied(
    conversations: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str]
) -> list[float]:
    """The share of the word's letters that the answer copies, whatever it judges: a second reward."""
    asked = [conversation[-1]["content"] for conversation in conversations]
    said = [reply.partition(" ")[2] for reply in answers]
    return [
        sum(a == b for a, b in zip(word, copy, strict=False)) / max(len(word), len(copy), 1)
        for word, copy in zip(asked, said, strict=True)
    ]
