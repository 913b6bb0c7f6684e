"""Checks that build the model: on the meta device, and, where asked for, for real."""

from collections.abc import Iterator

from expo.checkpoint.headers import printable
from expo.checkpoint.names import DERIVED
from expo.verification.check import Check, Info, Skipped
from expo.verification.configuration import same_config
from expo.verification.conversations import Conversation
from expo.verification.subject import Subject, generated

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
        s.refuse_codes()
        raise Skipped("the weights are not whole, or there is no config.json: it was not loaded")
    line = report.first("load")
    same = same_config(s)
    is_donors_build = same and _same_headers(s)
    if line is None:
        if "trust_remote_code" in (report.failure or ""):
            raise Skipped("the model needs its own code, which is never run here")
        yield _told(f"transformers cannot build the model: {report.failure}", is_donors_build)
        return
    info = line["load"]
    for key, what in (
        ("missing_keys", "is not in the files: loaders make up random values"),
        ("unexpected_keys", "has no place in the model: loaders ignore it"),
        ("mismatched_keys", "has another shape in the model"),
    ):
        for name in info[key]:
            if not DERIVED.search(name):
                shared = same and key != "mismatched_keys" and _is_in_both(s, name)
                yield _told(f"{printable(name)} {what}", shared or is_donors_build)
    yield from (_told(printable(said, 300), is_donors_build) for said in info["error_msgs"])


def _told(fault: str, shared: bool) -> str:
    return Info(f"{fault} (as in the aligned model)") if shared else fault


def _is_in_both(s: Subject, name: str) -> bool:
    """Whether the aligned model has, or lacks, this tensor too."""
    return (name in s.donor.weights) == (name in s.tensors)


def _same_headers(s: Subject) -> bool:
    theirs = s.donor.weights
    mine = {name: (tensor.dtype, tensor.shape) for name, tensor in s.tensors.items()}
    return mine == {name: (weight.dtype, weight.shape) for name, weight in theirs.items()}


def generation(s: Subject) -> Iterator[str]:
    """Answers that fail; where the aligned model's answer to the same prompt fails too, α is not to blame."""
    report = s.reports.generation
    if report is None:
        raise Skipped("not asked for: add --generate")
    mine, theirs = generated(report, "out"), generated(report, "aligned")
    if report.failure is not None:
        whose = "the aligned model's answer" if len(mine) == len(PROMPTS) else "answer"
        yield f"generating {whose} {len(theirs or mine) + 1}: {report.failure}"
    for number, line in mine.items():
        if fault := _fault(line):
            shared = number in theirs and _fault(theirs[number]) is not None
            said = f"{PROMPTS[number].name!r}: the answer {fault}"
            yield Info(f"{said}; the aligned model's fails too") if shared else said


def _fault(line: dict) -> str | None:
    if period := _loop(line["ids"]):
        return f"repeats {period} tokens over and over"
    if len(line["ids"]) >= NEW_TOKENS:
        return f"does not end within {NEW_TOKENS} tokens"
    return None if line["text"].strip() else "is empty"


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
    Check("load", "error", "transformers builds the model and misses nothing", "run the merge again; compare config.json with the aligned model's", load, "compare config.json and the tensors' names with those of the model that it was made from"),
    Check("generation", "error", "greedy answers end and do not loop", "try a smaller alpha; --against ALIGNED tells whether the aligned model fails too", generation, "--against ALIGNED tells whether the model that it was made from fails too"),
    Check("drift", "info", "", "", drift),
)  # fmt: skip
