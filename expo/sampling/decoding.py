"""How tokens are chosen: the model's own generation config, with what the user says on top."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from expo.errors import SpecError

if TYPE_CHECKING:
    from transformers import GenerationConfig

NEW_TOKENS = 2048


@dataclass(frozen=True)
class Decoding:
    """What decides which tokens come out. `temperature` 0 is greedy.

    `top_k` 0, `top_p` 1 and `min_p` 0 leave every token. The two penalties are vLLM's and OpenAI's:
    subtracted from the logits of tokens of the answer, once or as often as they came.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = NEW_TOKENS

    def __post_init__(self) -> None:
        for name, is_right in (
            ("temperature", 0 <= self.temperature < math.inf),
            ("top_k", self.top_k >= 0 and isinstance(self.top_k, int)),
            ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p <= 1),
            ("presence_penalty", math.isfinite(self.presence_penalty)),
            ("frequency_penalty", math.isfinite(self.frequency_penalty)),
            ("max_new_tokens", self.max_new_tokens >= 1 and isinstance(self.max_new_tokens, int)),
        ):
            if not is_right:
                raise SpecError(f"{name} {getattr(self, name)} is out of range: {_RANGES[name]}")


_RANGES = {
    "temperature": "0 (greedy) or more",
    "top_k": "0 (all tokens) or more, a whole number",
    "top_p": "above 0, at most 1 (all tokens)",
    "min_p": "from 0 (all tokens) to 1",
    "presence_penalty": "a finite number",
    "frequency_penalty": "a finite number",
    "max_new_tokens": "1 or more, a whole number",
}

PRESETS = {
    # chujiezheng/LLM-Extrapolation, generate_ultrafeedback.py
    "expo-paper": {
        "temperature": 0.7, "top_k": 50, "top_p": 0.9, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "max_new_tokens": 2048,
    },
}  # fmt: skip


def decoding(own: "GenerationConfig", preset: str | None = None, **given: float | None) -> Decoding:
    """The model's own settings, under those of a preset, under those given (None: not given).

    Raises:
        SpecError: there is no such preset, or a value is out of range.
    """
    check_preset(preset, {})
    found = PRESETS[preset] if preset else _own(own)
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(Decoding(), **found | changes)


def check_preset(preset: str | None, given: Mapping[str, float]) -> None:
    """That there is such a preset, and that what is given is in range, before a model is loaded.

    Raises:
        SpecError: there is none, no setting of that name, or a value is out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise SpecError(f"preset {preset} is not one of {', '.join(PRESETS)}")
    known = Decoding.__dataclass_fields__
    if unknown := next((name for name in given if name not in known), None):
        raise SpecError(f"there is no setting {unknown}: one of {', '.join(known)}")
    replace(Decoding(), **given)  # pyright: ignore[reportArgumentType]


def _own(config: "GenerationConfig") -> dict[str, float]:
    """What the generation config says, with transformers' defaults."""
    length = {} if config.max_new_tokens is None else {"max_new_tokens": config.max_new_tokens}
    if not config.do_sample:
        return length
    names = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    said = {name: getattr(config, name) for name in names}
    return length | {name: names[name] if v is None else v for name, v in said.items()}
