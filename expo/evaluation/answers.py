"""What was asked and what came back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from expo.sampling.prompts import Message, Prompt

FinishReason = Literal["stop", "length", "content_filter"]
"""Why an answer ends: by itself, for want of room, or because a server cut it."""


@dataclass(frozen=True)
class Reply:
    """One answer. `length` is in tokens, None where a server did not say."""

    text: str
    length: int | None
    finish_reason: FinishReason


@dataclass(frozen=True)
class Answer:
    """A conversation that is done: one reply a turn. `time` is when, in seconds since 1970."""

    prompt: Prompt
    candidate: int
    replies: tuple[Reply, ...]
    time: float
    reward: float | None = None

    @property
    def length(self) -> int | None:
        """In tokens, of all turns."""
        known = [reply.length for reply in self.replies if reply.length is not None]
        return sum(known) if len(known) == len(self.replies) else None

    @property
    def is_unfinished(self) -> bool:
        return any(reply.finish_reason == "length" for reply in self.replies)

    @property
    def is_filtered(self) -> bool:
        return any(reply.finish_reason == "content_filter" for reply in self.replies)

    @property
    def asked(self) -> tuple[Message, ...]:
        """Every turn of both sides but the last reply."""
        return so_far(self.prompt, self.replies)

    @property
    def text(self) -> str:
        """The last reply."""
        return self.replies[-1].text


@dataclass(frozen=True)
class Question:
    """A prompt that is to be answered; `settings` says how, for this one."""

    prompt: Prompt
    candidate: int = 0
    settings: dict[str, float] = field(default_factory=dict)

    def turn(self, replies: Sequence[Reply]) -> Prompt:
        """The conversation up to the turn after these replies.

        Its name decides what is drawn: the first turn of the first candidate is named as the prompt
        is, so that its answer is paired with every other model's.
        """
        name = self.prompt.id + (f"#{self.candidate}" if self.candidate else "")
        if not replies:
            return Prompt(name, self.prompt.messages)
        return Prompt(f"{name}/{len(replies)}", so_far(self.prompt, replies))


def so_far(prompt: Prompt, replies: Sequence[Reply]) -> tuple[Message, ...]:
    """The prompt, and after every reply that has one the user's next turn."""
    messages = [*prompt.messages]
    for reply, text in zip(replies, prompt.later, strict=False):
        messages += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": text},
        ]
    return tuple(messages)
