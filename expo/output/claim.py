"""Whether OUT may be written, and where a run works until it may appear."""

from pathlib import Path

from expo.errors import OutputError
from expo.output.manifest import Manifest
from expo.spec.request import Request

INSIDE = ".expo-staging"


def staging_path(out: Path, *, inside: bool) -> Path:
    return out / INSIDE if inside else out.with_name(f".{out.name}.expo-staging")


def check_out(out: Path, request: Request, *, overwrite: bool) -> None:
    """Refuse an OUT that holds something (unless it is to be replaced) or overlaps an input.

    Raises:
        OutputError: OUT is a file, not empty, or is, holds or lies in an input.
    """
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a directory for the output")
    for reference in request.references():
        for place in (reference.model, reference.adapter):
            if place is not None and place.path is not None:
                _check_apart(out, place.path.resolve())
    if out.is_dir() and not overwrite and not is_free(out):
        raise OutputError(f"{out} exists and is not empty: choose another, or add --overwrite")


def is_free(out: Path) -> bool:
    """Whether OUT holds nothing, or only what an interrupted run has left or moved so far."""
    names = {entry.name for entry in out.iterdir()} - {INSIDE, "lost+found"}
    if not names:
        return True
    manifest = Manifest.of_folder(out / INSIDE)
    return manifest is not None and names <= {Path(name).parts[0] for name in manifest.listed}


def _check_apart(out: Path, source: Path) -> None:
    if out == source or out in source.parents or source in out.parents:
        raise OutputError(f"{out} overlaps the input {source}: choose another directory")
