"""Checks that build the model: on the meta device, and, where asked for, for real."""

from collections.abc import Iterator

from expo.checkpoint.headers import printable
from expo.checkpoint.names import DERIVED
from expo.verification.check import Check, Info, Skipped
from expo.verification.configuration import same_config
from expo.verification.conversations import Conversation
from expo.verification.subject import Subject

NEW_TOKENS = 256
PROMPTS = tuple(
    Conversation(text, [{"role": "user", "content": text}])
    for text in ("Hello", "What is 2 + 2? Answer with the number only.", "Name one colour.")
)

_LOOP_TOKENS = 48  # a tail of this many tokens that repeats a short pattern is a loop
_LOOP_PERIOD = 16


def load(s: Subject) -> Iterator[str]:
    """Every weight finds its place, and every place its weight."""
    report = s.reports.load
    if report is None:
        raise Skipped("the weights are not whole, or there is no config.json: it was not loaded")
    line = report.first("load")
    if line is None:
        if "trust_remote_code" in (report.failure or ""):
            raise Skipped("the model needs its own code, which is never run here")
        yield f"transformers cannot build the model: {report.failure}"
        return
    info = line["load"]
    for key, what in (
        ("missing_keys", "is not in the files: loaders make up random values"),
        ("unexpected_keys", "has no place in the model: loaders ignore it"),
        ("mismatched_keys", "has another shape in the model"),
    ):
        for name in info[key]:
            if not DERIVED.search(name):
                fault = f"{printable(name)} {what}"
                shared = _is_donors(s, name, key)
                yield Info(f"{fault} (as in the aligned model)") if shared else fault
    yield from (printable(message, 300) for message in info["error_msgs"])


def _is_donors(s: Subject, name: str, key: str) -> bool:
    """Whether the aligned model builds the same model, and has (or lacks) the same key for it."""
    if s.aligned is None or key == "mismatched_keys" or not same_config(s):
        return False
    return (name in s.aligned.weights) == (name in s.tensors)


def generation(s: Subject) -> Iterator[str]:
    report = s.reports.generation
    if report is None:
        raise Skipped("not asked for: add --generate")
    answers = [line for line in report.lines if "generated" in line]
    if report.failure is not None:
        yield f"generating answer {len(answers) + 1}: {report.failure}"
    for line in answers:
        prompt = PROMPTS[line["generated"]].name
        if period := _loop(line["ids"]):
            yield f"{prompt!r}: the answer repeats {period} tokens over and over"
        elif len(line["ids"]) >= NEW_TOKENS:
            yield f"{prompt!r}: the answer does not end within {NEW_TOKENS} tokens"
        elif not line["text"].strip():
            yield f"{prompt!r}: the answer is empty"


def _loop(ids: list[int]) -> int | None:
    """The period of a tail that only repeats itself."""
    tail = ids[-_LOOP_TOKENS:]
    if len(tail) < _LOOP_TOKENS:
        return None
    periods = range(1, _LOOP_PERIOD + 1)
    return next((p for p in periods if tail[p:] == tail[:-p]), None)


def drift(s: Subject) -> Iterator[str]:
    line = s.reports.generation.first("drift") if s.reports.generation else None
    if line is None:
        raise Skipped("needs --generate and --against a whole model on this disk")
    yield f"KL(this model ‖ aligned) is {line['drift']:.3g} nats a token over its own answers"


CHECKS = (
    Check("load", "error", "transformers builds the model and misses nothing", "run the merge again; compare config.json with the aligned model's", load),
    Check("generation", "error", "greedy answers end and do not loop", "try a smaller alpha", generation),
    Check("drift", "info", "", "", drift),
)  # fmt: skip
