"""What a check is, and what it comes to.

A check is one row of a table: a name, a severity, what holds where it passes, the cure where it does
not, and a function that yields every fault it finds. A fault that the aligned model has as well is
not the merge's doing and is worth a warning at most.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from expo.errors import ExpoError
from expo.results import CheckResult, Status

if TYPE_CHECKING:
    from expo.verification.subject import Subject

Severity = Literal["error", "warning", "info"]

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


class Inherited(str):
    """A fault that the aligned model has too."""


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
        faults = list(check.find(subject))
    except Skipped as reason:
        return CheckResult(check.name, "skipped", str(reason), "")
    except _MALFORMED as error:
        what = f"cannot be checked: {str(error) or type(error).__name__}"
        return CheckResult(check.name, "error", what, check.cure)
    if not faults:
        return CheckResult(check.name, "pass", check.claim, "")
    own = [fault for fault in faults if not isinstance(fault, Inherited)]
    status: Status = check.severity
    if not own and check.severity == "error":
        status = "warning"
        faults = [f"{fault} (as in the aligned model)" for fault in faults]
    return CheckResult(check.name, status, listing([*own] or faults), check.cure)


def listing(faults: list[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more
