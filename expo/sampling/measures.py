"""What can be said of an answer without a reward model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from expo.sampling.generate import Sample, encode
from expo.sampling.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GRAM = 4
_LOGITS = 1 << 28  # held at a time


def repetition(tokens: Sequence[int]) -> float:
    """The share of 4-grams that came before: 0 where nothing is repeated, near 1 in a loop."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def log_likelihoods(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
) -> list[float]:
    """log p(answer | prompt) a token, in nats, with the token that ended it."""
    pairs = [
        (encode(tokenizer, prompt), sample.tokens)
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    longest = max((len(p) + len(a) for p, a in pairs), default=1)
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, min(batch_size, _LOGITS // (longest * vocabulary)))
    found: list[float] = []
    for begin in range(0, len(pairs), rows):
        found += _likelihoods(model, pairs[begin : begin + rows])
    return found


def _likelihoods(
    model: "PreTrainedModel", pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    whole = [[*prompt, *answer] for prompt, answer in pairs]
    longest = max(map(len, whole))
    ids = torch.tensor([w + [0] * (longest - len(w)) for w in whole], device=model.device)
    mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in whole], device=ids.device)
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        said = -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        ).view(len(whole), -1)
    return [
        float(row[len(p) - 1 : len(p) + len(a) - 1].double().mean()) if a else 0.0
        for row, (p, a) in zip(said, pairs, strict=True)
    ]
