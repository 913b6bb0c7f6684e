"""Which row of another model's embedding belongs to which row of the donor's (the aligned model's)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Vocabulary = dict[int, str] | None


@dataclass(frozen=True, slots=True)
class RowRun:
    """`count` rows of the aligned model from `aligned`, and of the base from `base`.

    `base` is None where only the aligned model has these rows: they are copied.
    """

    aligned: int
    base: int | None
    count: int


@dataclass(frozen=True)
class RowMatch:
    """How the rows of every embedding match. No runs: row i is row i."""

    runs: tuple[RowRun, ...] = ()
    copied: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SharedRows:
    """`count` rows of the donor from `donor`, and where each of the other models has them; None where
    one of them has not: such rows are the donor's own."""

    donor: int
    others: tuple[int, ...] | None
    count: int


def match_rows(
    base: Vocabulary, aligned: Vocabulary, base_rows: int, aligned_rows: int
) -> RowMatch | None:
    """Match rows by token string where both vocabularies are known, else by index.

    Rows beyond the last token are padding and match by index where both sides have them. None
    where the counts differ and a vocabulary is unknown: nobody can say which row is which.
    """
    if base is None or aligned is None:
        return RowMatch() if base_rows == aligned_rows else None
    partner = _partners(base, aligned, base_rows, aligned_rows)
    if base_rows == aligned_rows and all(i == j for i, j in enumerate(partner)):
        return RowMatch()
    used = {row for row in partner if row is not None}
    return RowMatch(
        runs=_runs(partner),
        copied=tuple(row for row, other in enumerate(partner) if other is None),
        dropped=tuple(row for row in range(base_rows) if row not in used),
    )


def _partners(
    base: dict[int, str], aligned: dict[int, str], base_rows: int, aligned_rows: int
) -> list[int | None]:
    """For each row of the aligned model, the base's row of the same token."""
    counts = Counter(base.values())
    row_of = {t: row for row, t in base.items() if row < base_rows and counts[t] == 1}

    def partner(row: int) -> int | None:
        token = aligned.get(row)
        if token is None:
            return row if row < base_rows and row not in base else None
        if base.get(row) == token and row < base_rows:
            return row
        return row_of.get(token)

    return [partner(row) for row in range(aligned_rows)]


def _runs(partner: list[int | None]) -> tuple[RowRun, ...]:
    runs: list[RowRun] = []
    for row, other in enumerate(partner):
        last = runs[-1] if runs else None
        follows = last is not None and (
            other is None if last.base is None else other == last.base + last.count
        )
        if last is not None and follows:
            runs[-1] = RowRun(last.aligned, last.base, last.count + 1)
        else:
            runs.append(RowRun(row, other, 1))
    return tuple(runs)


def share_rows(matches: Sequence[RowMatch], rows: int) -> tuple[SharedRows, ...]:
    """The donor's `rows` in runs that lie together in every other model; empty where all rows match as
    they are."""
    if not any(match.runs for match in matches):
        return ()
    each = [_spread(match, rows) for match in matches]
    edges = sorted({run.aligned for runs in each for run in runs} | {rows})
    shared = []
    places = [iter(runs) for runs in each]
    current = [next(runs) for runs in places]
    for first, end in pairwise(edges):
        for number, run in enumerate(current):
            if run.aligned + run.count <= first:
                current[number] = next(places[number])
        firsts = [None if run.base is None else run.base + first - run.aligned for run in current]
        others = None if None in firsts else tuple(row for row in firsts if row is not None)
        shared.append(SharedRows(first, others, end - first))
    return tuple(shared)


def _spread(match: RowMatch, rows: int) -> tuple[RowRun, ...]:
    return match.runs or (RowRun(0, 0, rows),)
