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

GONE = "the weights have left this disk"
UNREAD = "values are looked at by a whole expo verify, not during the merge"
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
    cannot be either. It has a cure of its own."""

    cure: str

    def __new__(cls, fault: str, cure: str) -> "Unchecked":
        made = super().__new__(cls, fault)
        made.cure = cure
        return made


class Skipped(Exception):
    """What a check needs is not there; the message says what."""


@dataclass(frozen=True)
class Check:
    """One row of the table of checks.

    `elsewhere` is the cure for a folder that no merge of expo made, where it is another one.
    """

    name: str
    severity: Severity
    claim: str
    cure: str
    find: "Callable[[Subject], Iterator[str]]"
    elsewhere: str = ""


def run(check: Check, subject: "Subject") -> CheckResult:
    """Run one check. What it cannot make sense of is an error of the folder, not of the run."""
    try:
        faults = _faults(check, subject)
    except Skipped as reason:
        return CheckResult(check.name, "skipped", str(reason), "")
    if not faults:
        return CheckResult(check.name, "pass", check.claim, "")
    unchecked = [fault for fault in faults if isinstance(fault, Unchecked)]
    shared = _shared(check, subject, faults) - set(unchecked)
    own = [fault for fault in faults if not isinstance(fault, Info) and fault not in shared]
    if own:
        cure = unchecked[0].cure if own == unchecked else _cure(check, subject)
        return CheckResult(check.name, check.severity, listing(own), cure)
    notes = [_as_aligned(fault) if fault in shared else fault for fault in faults]
    return CheckResult(check.name, "info", listing(notes), "")


def _cure(check: Check, subject: "Subject") -> str:
    return check.cure if subject.was_merged else check.elsewhere or check.cure


def _as_aligned(fault: str) -> str:
    return f"{fault} (as in the aligned model)"


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


def _shared(check: Check, subject: "Subject", faults: list[str]) -> set[str]:
    """What the same check finds, or found at the merge, in the aligned model: not the merge's doing."""
    if subject.aligned is None:
        return _remembered(check, subject, faults)
    try:
        return set(_faults(check, subject.as_donor))
    except Skipped:
        return set()


def _remembered(check: Check, subject: "Subject", faults: list[str]) -> set[str]:
    """Of a folder alone, what its own merge saw in the aligned model too: one rule, one verdict."""
    then = subject.found_at_merge.get(check.name)
    if then is None or then.status != "info":
        return set()
    real = [fault for fault in faults if not isinstance(fault, Info)]
    if then.message == listing(list(map(_as_aligned, real))):
        return set(real)
    return {fault for fault in real if _as_aligned(fault) in then.message}


def listing(faults: list[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more
