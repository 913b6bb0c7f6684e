"""Beam search: the likeliest answers, as far as the beams reach."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from expo.sampling.generate import Sample, encode, pad_left
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
    config = copy.deepcopy(model.generation_config)
    assert config is not None
    config.update(
        do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None, typical_p=None,
        num_beams=num_beams, num_return_sequences=1, max_length=None,
        max_new_tokens=max_new_tokens, return_dict_in_generate=False,
    )  # fmt: skip
    ids, mask = pad_left([encode(tokenizer, prompt.messages)], 0, model.device)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, generation_config=config)  # pyright: ignore[reportCallIssue]
    said = out[0, ids.shape[1] :].tolist()  # pyright: ignore[reportIndexIssue]
    ends = config.eos_token_id
    is_end = {ends} if isinstance(ends, int) else {*(ends or ())}
    finished = bool(said) and said[-1] in is_end
    text = str(tokenizer.decode(said, skip_special_tokens=True))
    return Sample(text, tuple(said), "stop" if finished else "length")
