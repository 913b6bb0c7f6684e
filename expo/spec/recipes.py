"""The specs and golden vectors that come with expo: found by name, in a checkout and in a wheel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expo.errors import SpecError
from expo.spec.strict import nearest

_PACKAGE = Path(__file__).parent.parent
_SHOWN = 5  # names of recipes in a message
_FOLDERS = (_PACKAGE / "merge_configs", _PACKAGE.parent / "merge_configs")


@dataclass(frozen=True)
class Recipe:
    """A spec by its name, with the first sentence of its comment."""

    name: str
    path: Path
    title: str


def recipes() -> Iterator[Recipe]:
    """Every spec that comes with expo, by name."""
    for path in sorted(_folder().glob("*.yml")):
        yield Recipe(path.stem, path, _title(path.read_text(encoding="utf-8")))


def _title(text: str) -> str:
    """The comment at the top, up to the sources or the first full stop at the end of a line."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith(("# Sources:", "#   ")):
            break
        lines.append(line.removeprefix("# "))
        if line.endswith("."):
            break
    return " ".join(lines)


def spec_path(given: Path) -> Path:
    """What exists is a path; otherwise a name of a recipe, or the path as it was given.

    Raises:
        SpecError: it is a plain name, and neither a file nor a recipe has it.
    """
    if given.exists() or len(given.parts) > 1:
        return given
    is_file = given.suffix in (".yml", ".yaml")
    named = _folder() / f"{given.stem if is_file else given.name}.yml"
    known = [path.stem for path in _folder().glob("*.yml")]
    if not is_file and named.exists():
        return named
    if is_file and named.exists():
        close = f" (did you mean the recipe {named.stem}?)"
    else:
        close = nearest(named.stem, known) or _beginning(named.stem, known)
    what = "does not exist" if is_file else "is neither a file nor a recipe"
    raise SpecError(f"{given} {what}{close}; expo merge --list shows the recipes")


def _beginning(word: str, known: list[str]) -> str:
    """` (recipes that begin so: …)`, or nothing."""
    found = sorted(name for name in known if name.startswith(word.lower()))
    return f" (recipes that begin so: {', '.join(found[:_SHOWN])})" if found else ""


def vectors_path(given: str, beside: Path | None) -> Path:
    """Golden vectors: a path, also from the folder of the spec, or the name of a file of ours.

    Raises:
        SpecError: there is no such file, and no vectors of ours have that name.
    """
    places = [
        Path(given),
        *([beside / given] if beside else []),
        _folder() / "vectors" / f"{given}.yml",
    ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = sorted(path.stem for path in (_folder() / "vectors").glob("*.yml"))
        names = nearest(given, known) or f"; those of ours: {', '.join(known)}"
        raise SpecError(f"{given} is neither a file nor golden vectors of ours{names}")
    return found


def _folder() -> Path:
    return next(folder for folder in _FOLDERS if folder.is_dir())
