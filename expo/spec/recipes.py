"""The specs and golden vectors that come with expo: found by name, in a checkout and in a wheel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expo.errors import SpecError
from expo.spec.strict import nearest

_PACKAGE = Path(__file__).parent.parent
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
        SpecError: it is a plain name, and no recipe has it.
    """
    if given.exists() or len(given.parts) > 1 or given.suffix in (".yml", ".yaml"):
        return given
    named = _folder() / f"{given.name}.yml"
    if not named.exists():
        close = nearest(given.name, [path.stem for path in _folder().glob("*.yml")])
        raise SpecError(
            f"{given} is neither a file nor a recipe{close}; expo merge --list shows the recipes"
        )
    return named


def vectors_path(given: str, beside: Path | None) -> Path:
    """Golden vectors: a path, also from the folder of the spec, or the name of a file of ours."""
    places = [
        Path(given),
        *([beside / given] if beside else []),
        _folder() / "vectors" / f"{given}.yml",
    ]
    return next((place for place in places if place.is_file()), Path(given))


def _folder() -> Path:
    return next(folder for folder in _FOLDERS if folder.is_dir())
