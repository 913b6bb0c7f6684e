"""The findings of a verification as a person reads them: worst first, what passed in one line."""

import textwrap
from typing import TYPE_CHECKING

from expo.cli.streams import red

if TYPE_CHECKING:
    from expo.results import CheckResult, VerifyResult

_WIDTH = 100

VERIFIED = "verified"
NOT_VERIFIED = red("NOT verified")


def verify_text(result: "VerifyResult", out: str, *, verbose: bool = False) -> str:
    """The verdict, every finding worst first, and where `verbose` what passed or could not be checked."""
    lines = [verdict(result, out), *_findings(result, ("error", "warning", "info"))]
    if verbose:
        lines += [*_unchecked(result), *_passed(result)]
    return "\n".join(lines)


def findings(result: "VerifyResult") -> str:
    """Errors and warnings."""
    return "\n".join(_findings(result, ("error", "warning")))


def _unchecked(result: "VerifyResult") -> list[str]:
    reasons: dict[str, list[str]] = {}
    for check in result.checks:
        if check.status == "skipped":
            reasons.setdefault(check.message, []).append(check.name)
    return [
        line
        for reason, names in reasons.items()
        for line in _wrapped(f"{'unknown':<8} ", f"{', '.join(names)}: not checked, {reason}")
    ]


def _passed(result: "VerifyResult") -> list[str]:
    names = [check.name for check in result.checks if check.status == "pass"]
    return _wrapped(f"{'pass':<8} ", ", ".join(names)) if names else []


def _findings(result: "VerifyResult", statuses: tuple[str, ...]) -> list[str]:
    return [
        line
        for status in statuses
        for check in result.checks
        if check.status == status
        for line in _finding(check)
    ]


def verdict(result: "VerifyResult", out: str) -> str:
    """One line: verified or not, and how many checks came to what."""
    counts = [
        (sum(c.status == s for c in result.checks), s)
        for s in ("error", "warning", "pass", "skipped")
    ]
    words = {"error": "error", "warning": "warning", "pass": "passed", "skipped": "not checked"}
    shown = [
        f"{count} {words[status]}{'s' if count > 1 and status in ('error', 'warning') else ''}"
        for count, status in counts
        if count
    ]
    return f"{out}: {VERIFIED if result.ok else NOT_VERIFIED}, {', '.join(shown)}"


def _finding(check: "CheckResult") -> list[str]:
    first, *more = check.message.split("\n")
    lead = f"{check.status:<8} {check.name:<24} "
    lines = [*_wrapped(lead, first), *(" " * 9 + line for line in more)]
    if check.cure:
        lines += _wrapped(" " * 9 + "→ ", check.cure)
    return [red(line) for line in lines] if check.status == "error" else lines


def _wrapped(lead: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [lead.rstrip()]
