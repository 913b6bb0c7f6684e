"""Beam search: the likeliest answers, as far as the beams reach."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from expo.sampling.generate import (
    Sample,
    answer_limits,
    encode,
    end_ids,
    greedy_config,
    pad_left,
    sample_of,
)
from expo.sampling.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def beam_search(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    num_beams: int,
    max_new_tokens: int,
) -> list[Sample]:
    """One answer to every prompt, in their order, each searched by itself: nothing is drawn."""
    return [_searched(model, tokenizer, prompt, num_beams, max_new_tokens) for prompt in prompts]


def _searched(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    num_beams: int,
    max_new_tokens: int,
) -> Sample:
    ids = encode(tokenizer, prompt)
    (limit,) = answer_limits(model, [ids], [prompt], max_new_tokens)
    config = greedy_config(model, tokenizer, limit, num_beams=num_beams)
    rows, mask = pad_left([ids], 0, model.device)
    with torch.inference_mode():
        out = model.generate(rows, attention_mask=mask, generation_config=config)  # pyright: ignore[reportCallIssue]
    said = out[0, rows.shape[1] :].tolist()  # pyright: ignore[reportIndexIssue]
    return sample_of(tokenizer, said, end_ids(config))
