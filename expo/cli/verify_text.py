"""The findings of a verification as a person reads them: worst first, what passed in one line."""

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expo.results import CheckResult, VerifyResult

_WIDTH = 100


def verify_text(result: "VerifyResult", out: str) -> str:
    """Every finding, what could not be checked and why, what passed, and the verdict."""
    reasons: dict[str, list[str]] = {}
    for check in result.checks:
        if check.status == "skipped":
            reasons.setdefault(check.message, []).append(check.name)
    skipped = [
        line
        for reason, names in reasons.items()
        for line in _wrapped(f"{'unknown':<8} ", f"{', '.join(names)}: not checked, {reason}")
    ]
    passed = [check.name for check in result.checks if check.status == "pass"]
    passes = _wrapped(f"{'pass':<8} ", ", ".join(passed)) if passed else []
    found = _findings(result, ("error", "warning", "info"))
    return "\n".join([*found, *skipped, *passes, verdict(result, out)])


def findings(result: "VerifyResult", out: str) -> str:
    """Errors and warnings, and the verdict."""
    return "\n".join([*_findings(result, ("error", "warning")), verdict(result, out)])


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
    return f"{out}: {'verified' if result.ok else 'NOT verified'}, {', '.join(shown)}"


def _finding(check: "CheckResult") -> list[str]:
    first, *more = check.message.split("\n")
    lead = f"{check.status:<8} {check.name:<24} "
    lines = [*_wrapped(lead, first), *(" " * 9 + line for line in more)]
    if check.cure:
        lines += _wrapped(" " * 9 + "→ ", check.cure)
    return lines


def _wrapped(lead: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [lead.rstrip()]
