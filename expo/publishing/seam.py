"""THE SEAM to the card, the licence table and the signature: five functions that the modules `card`, `licences`
and `signature` of this room take over. Nothing else here knows them."""

import re
from dataclasses import dataclass
from pathlib import Path

from expo.errors import SpecError
from expo.output.card import card as minimal_card
from expo.output.manifest import Manifest


@dataclass(frozen=True)
class Terms:
    """Under which licence OUT is published; `prefix` is what its name has to begin with."""

    licence: str | None
    prefix: str | None = None


def terms(manifest: Manifest, asked: str | None) -> Terms:
    """→ `licences.terms`."""
    return Terms(asked)


def readme(manifest: Manifest, existing: str | None, terms: Terms, results: Path | None) -> str:
    """→ `card.card` and `card.renewed`."""
    if results is not None:
        raise SpecError("--results: evaluation tables are not part of the card yet: leave it out")
    text = minimal_card(manifest) if existing is None else existing
    if terms.licence is None or not text.startswith("---\n"):
        return text
    without = re.sub(r"\A---\n(.*?)^license: .*?\n", r"---\n\1", text, flags=re.S | re.M)
    return without.replace("---\n", f"---\nlicense: {terms.licence}\n", 1)


def check_key(key: Path) -> None:
    """→ `signature`: that a key can sign, before anything is sent."""
    raise SpecError(f"--sign {key}: signing is not there yet: leave it out")


def sign(out: Path, key: Path) -> None:
    """→ `signature`: sign OUT, last."""
    check_key(key)
