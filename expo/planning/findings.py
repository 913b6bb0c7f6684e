"""What the planning finds on its way: what does not fit, and what the user should know."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from expo.checkpoint.headers import printable

_LISTED = 5  # names in a message before "and N more"


@dataclass
class Findings:
    """Names that do not match, and remarks by how serious they are."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def summarize(found: Findings, models: str, *, is_expo: bool) -> None:
    """Turn what does not match into refusals with a cure; `models` names them."""
    pair, donor, others = f"({models})", "the aligned model", "the SFT model"
    question = "is this the model that the aligned one was trained from?"
    if not is_expo:
        donor, others = "the donor", "another model"
        question = "models of one shape are needed; tokenizer_source: union makes one vocabulary"
    if found.missing:
        found.refusals.append(
            f"{tensors(found.missing)} only in {donor} {pair}: "
            f"{listing(map(printable, found.missing))}; --allow-missing REGEX copies them"
        )
    if found.extra:
        found.refusals.append(
            f"{tensors(found.extra)} only in {others} {pair}: "
            f"{listing(map(printable, found.extra))}; --allow-missing REGEX drops them"
        )
    if found.mismatched:
        found.refusals.append(
            f"{tensors(found.mismatched)} of another shape or kind {pair}: "
            f"{listing(found.mismatched)}; {question}"
        )


def gigabytes(count: int) -> str:
    """Bytes as a person reads them, in the unit that leaves something to read."""
    for unit, one, least in (("GB", 1e9, 1e8), ("MB", 1e6, 1e5), ("KB", 1e3, 1e3)):
        if count >= least:
            return f"{count / one:.2f} {unit}"
    return f"{count} bytes"


def room(needed: int, free: int) -> str:
    """How much is needed and how much there is."""
    return f"{gigabytes(needed)} are needed, {gigabytes(free)} are free"


def fell_back(matrices: Iterable[str]) -> tuple[str, ...]:
    """What there is to say of matrices that a device was lent and could not take apart; nothing where there is none."""
    names = list(dict.fromkeys(map(printable, matrices)))
    if not names:
        return ()
    count, them = (f"{len(names)} matrices", "them") if len(names) > 1 else ("1 matrix", "it")
    return (
        f"the device had no room for {count}, or its library failed: the processor took {them} apart, with other last "
        f"bits: {listing(names)}",
    )


def tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def listing(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
