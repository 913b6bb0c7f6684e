"""Answers from a model in memory, such that no draw depends on which other answers are made beside it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expo.errors import CheckpointError
from expo.sampling.decoding import Decoding
from expo.sampling.noise import gumbel, origin
from expo.sampling.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sample:
    """An answer: its text, its token ids with the one that ended it, and why it ended."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.tokens)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    decoding: Decoding,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Sample]:
    """One answer to every prompt, in their order, through the model's own chat template.

    The noise of a sampled token is a function of (seed, prompt, position, token): the same for every
    model, so that what two of them answer is paired, and for every batch and run.

    Raises:
        CheckpointError: there is no chat template, or it or the context is too small for a prompt.
    """
    samples = []
    for begin in range(0, len(prompts), batch_size):
        samples += _batch(model, tokenizer, prompts[begin : begin + batch_size], decoding, seed)
    return samples


def check_fit(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]
) -> None:
    """Refuse, before the first is answered, prompts that cannot be.

    Raises:
        CheckpointError: as `generate`.
    """
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    answer_limits(model, encoded, prompts, 1)


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """The token ids of a conversation up to where the answer starts.

    Raises:
        CheckpointError: there is no chat template, or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"{_name(tokenizer)} has no chat template: put a chat_template.jinja beside the model"
        )
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # a template may raise anything
        raise CheckpointError(
            f"the chat template refuses prompt {prompt.id}: {' '.join(str(error).split())}"
        ) from error
    return list(ids)  # pyright: ignore


def _batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    decoding: Decoding,
    seed: int,
) -> list[Sample]:
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    limits = answer_limits(model, encoded, prompts, decoding.max_new_tokens)
    config = greedy_config(model, tokenizer, max(limits))
    ids, mask = pad_left(encoded, config.pad_token_id or 0, model.device)
    start = ids.shape[1]
    with torch.inference_mode():
        out = model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=_processors(prompts, decoding, seed, start),
            stopping_criteria=StoppingCriteriaList([_Limits(limits, start, model.device)]),
            tokenizer=tokenizer,
        )
    ends = end_ids(config)
    made = out[:, start:].tolist()  # pyright: ignore[reportIndexIssue]
    return [sample_of(tokenizer, t[:n], ends) for t, n in zip(made, limits, strict=True)]


def sample_of(tokenizer: "PreTrainedTokenizerBase", tokens: list[int], ends: set[int]) -> Sample:
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[: end + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Sample(str(text), tuple(kept), "length" if end is None else "stop")


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: "torch.device"
) -> "tuple[Tensor, Tensor]":
    """Token ids and attention mask, int64 of shape (rows, longest), with what is short on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + [*r] for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def answer_limits(
    model: "PreTrainedModel",
    encoded: Sequence[Sequence[int]],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> list[int]:
    """How many tokens each answer may have: the prompts beside it do not take from its context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = []
    for ids, prompt in zip(encoded, prompts, strict=True):
        room = max_new_tokens if context is None else context - len(ids)
        if room < 1:
            raise CheckpointError(
                f"prompt {prompt.id} has {len(ids)} tokens, the model's context {context}: leave it out"
            )
        limits.append(min(room, max_new_tokens))
    return limits


def greedy_config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    new_tokens: int,
    *,
    num_beams: int = 1,
) -> "GenerationConfig":
    """The model's own, one answer each and nothing drawn: what samples is among the processors."""
    config = copy.deepcopy(model.generation_config)
    assert config is not None
    config.update(
        do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None, typical_p=None,
        num_beams=num_beams, num_return_sequences=1, max_length=None, max_new_tokens=new_tokens,
        return_dict_in_generate=False,
    )  # fmt: skip
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        ends = sorted(end_ids(config))
        known = tokenizer.pad_token_id
        config.pad_token_id = known if known is not None else (ends or [0])[0]
    return config


def end_ids(config: "GenerationConfig") -> set[int]:
    ends = config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _processors(
    prompts: Sequence[Prompt], decoding: Decoding, seed: int, start: int
) -> LogitsProcessorList:
    """In vLLM's order: penalties, temperature, cuts; then the draw."""
    chain = LogitsProcessorList()
    if decoding.presence_penalty or decoding.frequency_penalty:
        chain.append(_Penalties(decoding.presence_penalty, decoding.frequency_penalty, start))
    if not decoding.temperature:
        return chain
    chain.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_k:
        chain.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        chain.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        chain.append(MinPLogitsWarper(decoding.min_p))
    chain.append(_Draw([origin(seed, prompt.id) for prompt in prompts], start))
    return chain


class _Draw(LogitsProcessor):
    """Gumbel noise on the logits: the largest is then a draw."""

    def __init__(self, origins: list[int], start: int) -> None:
        self._origins, self._start = origins, start

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        position = input_ids.shape[1] - self._start
        return scores + gumbel(self._origins, position, scores.shape[1], scores.device)


class _Penalties(LogitsProcessor):
    """Subtracts from what the answer has said already."""

    def __init__(self, presence: float, frequency: float, start: int) -> None:
        self._presence, self._frequency, self._start = presence, frequency, start

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        said = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(
            1, said, torch.ones_like(said, dtype=scores.dtype)
        )
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _Limits(StoppingCriteria):
    """Ends every answer at its own limit."""

    def __init__(self, limits: list[int], start: int, device: "torch.device") -> None:
        self._ends = torch.tensor(limits, device=device) + start

    def __call__(self, input_ids: "Tensor", scores: object, **_: object) -> "Tensor":  # pyright: ignore
        return input_ids.shape[1] >= self._ends


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return type(tokenizer).__name__
