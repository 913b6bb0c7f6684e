"""What a check is, and what it comes to.

A check is one row of a table: a name, a severity, what holds where it passes, the cure where it does
not, and a function that yields every fault it finds. The same function is asked of the aligned model:
a fault that it has as well is not the merge's doing and is information at most.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from expo.errors import ExpoError, MistakenFileError
from expo.results import CheckResult

if TYPE_CHECKING:
    from expo.verification.subject import Subject

Severity = Literal["error", "warning", "info"]

MISTAKEN = "a file that it reads is not what its name says"
_SHOWN = 5  # faults in a message before "and N more"
_MALFORMED = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
    OSError,
    ExpoError,
)


class Info(str):
    """Worth knowing, but nothing that loading or generating stumbles over."""


class Unchecked(str):
    """What could not be looked at although it should: an error, also where the aligned model's
    cannot be either."""


class Skipped(Exception):
    """What a check needs is not there; the message says what."""


@dataclass(frozen=True)
class Check:
    """One row of the table of checks."""

    name: str
    severity: Severity
    claim: str
    cure: str
    find: "Callable[[Subject], Iterator[str]]"


def run(check: Check, subject: "Subject") -> CheckResult:
    """Run one check. What it cannot make sense of is an error of the folder, not of the run."""
    try:
        faults = _faults(check, subject)
    except Skipped as reason:
        return CheckResult(check.name, "skipped", str(reason), "")
    if not faults:
        return CheckResult(check.name, "pass", check.claim, "")
    shared = _shared(check, subject)
    shared -= {fault for fault in faults if isinstance(fault, Unchecked)}
    own = [fault for fault in faults if not isinstance(fault, Info) and fault not in shared]
    if own:
        return CheckResult(check.name, check.severity, listing(own), check.cure)
    notes = [f"{f} (as in the aligned model)" if f in shared else f for f in faults]
    return CheckResult(check.name, "info", listing(notes), "")


def _faults(check: Check, subject: "Subject") -> list[str]:
    found: list[str] = []
    try:
        for fault in check.find(subject):
            found.append(fault)  # what was found before it broke off counts
    except MistakenFileError as error:  # which has a check of its own
        if not found:
            raise Skipped(MISTAKEN) from error
    except _MALFORMED as error:
        found.append(f"cannot be checked: {str(error) or type(error).__name__}")
    return found


def _shared(check: Check, subject: "Subject") -> set[str]:
    """What the same check finds in the aligned model: not the merge's doing."""
    if subject.aligned is None:
        return set()
    try:
        return set(_faults(check, subject.as_donor))
    except Skipped:
        return set()


def listing(faults: list[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more
