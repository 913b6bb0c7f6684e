"""The check against golden vectors."""

from collections.abc import Iterator

from expo.checkpoint.headers import printable
from expo.verification.check import Check, Skipped
from expo.verification.conversations import CONVERSATIONS
from expo.verification.golden import Case, TokenizerFacts
from expo.verification.subject import Subject
from expo.verification.template import differing_text
from expo.verification.tokenizer import differing_ids


def vectors(s: Subject) -> Iterator[str]:
    if s.golden is None:
        raise Skipped("no golden vectors given: add --vectors FILE|NAME")
    if s.reports.out is None or s.reports.out.first("loaded") is None:
        yield "the tokenizer did not load"
        return
    yield from _facts(s, s.golden.tokenizer)
    conversations = iter(
        range(len(CONVERSATIONS), len(CONVERSATIONS) + len(s.golden.conversations))
    )
    for case in s.golden.cases:
        came = _came(s, case, next(conversations) if case.text is None else None)
        if (fault := _fault(s, case, came)) is not None:
            yield f"{s.golden.name}, {printable(case.name)}: {fault}"


def _facts(s: Subject, expected: TokenizerFacts) -> Iterator[str]:
    facts = s.tokenizer.facts
    token = {index: name for name, index in facts["added"].items()}
    if expected.tokens is not None and facts["tokens"] != expected.tokens:
        yield f"the tokenizer has {facts['tokens']} tokens, {expected.tokens} expected"
    for name in ("bos", "eos", "pad"):
        wanted = getattr(expected, name)
        if wanted is not None and token.get(facts[name]) != wanted:
            yield f"{name.upper()} is {token.get(facts[name])}, {printable(wanted)} expected"
    for wanted, index in expected.ids.items():
        if facts["added"].get(wanted) != index and s.names.get(index) != wanted:
            yield f"{printable(wanted)} is not token {index}"


def _came(s: Subject, case: Case, number: int | None) -> dict:
    if case.text is not None:
        return s.tokenizer.texts.get(case.text, {"error": s.tokenizer.failure})
    said = s.tokenizer.conversations
    assert number is not None
    return said[number] if number < len(said) else {"error": s.tokenizer.failure}


def _fault(s: Subject, case: Case, came: dict) -> str | None:
    """What differs from what the case expects, or None."""
    if case.raises is not None:
        if "error" not in came:
            return f"should raise {printable(case.raises)!r}, but renders"
        good = case.raises in came["error"]
        return None if good else f"raises {came['error']}, {case.raises!r} expected"
    if "error" in came:
        return f"raises {printable(str(came['error']))}"
    if case.rendered is not None and came["rendered"] != case.rendered:
        return f"{differing_text(came['rendered'], case.rendered)} expected"
    if case.ids is not None and came["ids"] != case.ids:
        return differing_ids(came["ids"], case.ids, s.names, "expected")
    return None


def vectors_source(s: Subject) -> Iterator[str]:
    if s.golden is None:
        raise Skipped("no golden vectors given: add --vectors FILE")
    if s.golden.self_recorded:
        yield f"{s.golden.name} is self-recorded: it proves that nothing changed since"


CHECKS = (
    Check("vectors", "error", "golden vectors come out exactly", "use the tokenizer files and the template that the model was trained with", vectors),
    Check("vectors-source", "info", "the golden vectors were published", "", vectors_source),
)  # fmt: skip
