"""The specs and golden vectors that come with expo: found by name, in a checkout and in a wheel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "merge_configs", _PACKAGE.parent / "merge_configs")


@dataclass(frozen=True)
class Recipe:
    """A spec by its name, with the first line of its comment."""

    name: str
    path: Path
    title: str


def recipes() -> Iterator[Recipe]:
    """Every spec that comes with expo, by name."""
    for path in sorted(_folder().glob("*.yml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        yield Recipe(path.stem, path, first.removeprefix("# "))


def spec_path(given: Path) -> Path:
    """What exists is a path; otherwise a name of a recipe, or the path as it was given."""
    named = _folder() / f"{given.name}.yml"
    return named if not given.exists() and len(given.parts) == 1 and named.exists() else given


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
