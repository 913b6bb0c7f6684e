"""Match the rows of two models' embeddings by what their tokenizers call them."""

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.headers import printable
from expo.planning.findings import Findings, listing
from expo.planning.models import Models
from expo.planning.rows import RowMatch, Vocabulary, match_rows

_SAYS_WHICH = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "vocab.json")


class TokenRows:
    """How the rows of another model match the donor's, found once per pair of row counts."""

    def __init__(self, models: Models, other: Checkpoint, found: Findings) -> None:
        self._models, self._other, self._donor, self._found = models, other, models.donor, found
        self._matches: dict[tuple[int, int], RowMatch | None] = {}

    def match(self, name: str, other_rows: int, donor_rows: int) -> RowMatch | None:
        """None, and a refusal, where nobody can say which row is which."""
        counts = (other_rows, donor_rows)
        if counts not in self._matches:
            self._matches[counts] = self._find(name, *counts)
        return self._matches[counts]

    def _find(self, name: str, other_rows: int, donor_rows: int) -> RowMatch | None:
        if other_rows == donor_rows and self._have_one_tokenizer():
            return RowMatch()
        theirs, donors = self._other.vocabulary, self._donor.vocabulary
        match = match_rows(theirs, donors, other_rows, donor_rows)
        if match is None:
            self._refuse(name, other_rows, donor_rows, theirs)
        elif match.copied or match.dropped:
            self._note(match.copied, donors, self._donor, "copied")
            self._note(match.dropped, theirs, self._other, "dropped")
        elif match.runs:
            self._found.warnings.append("token ids differ: embedding rows are matched by token")
        return match

    def _have_one_tokenizer(self) -> bool:
        mine, theirs = self._other.tokenizer_files, self._donor.tokenizer_files
        if any(mine.sizes.get(name) != theirs.sizes.get(name) for name in _SAYS_WHICH):
            return False
        present = [name for name in _SAYS_WHICH if name in mine.sizes]
        vocabulary = {"tokenizer.json", "vocab.json"}.intersection(present)
        return bool(vocabulary) and all(mine.read(n) == theirs.read(n) for n in present)

    def _refuse(self, name: str, other_rows: int, donor_rows: int, theirs: Vocabulary) -> None:
        place, side = self._models.place, self._other if theirs is None else self._donor
        self._found.refusals.append(
            f"{printable(name)} has {other_rows} rows {place(self._other)} and {donor_rows} "
            f"{place(self._donor)}, and {self._models.name(side)} has no tokenizer that says which "
            "row is which token: add its tokenizer.json"
        )

    def _note(
        self, rows: tuple[int, ...], tokens: Vocabulary, checkpoint: Checkpoint, what: str
    ) -> None:
        if rows:
            labels = [f"{row} {printable((tokens or {}).get(row, '(padding)'))}" for row in rows]
            where = self._models.full_place(checkpoint)
            so = "" if self._models.compares else f": {what}"
            self._found.notes.append(
                f"{len(rows)} embedding rows only {where}{so}: {listing(labels)}"
            )
