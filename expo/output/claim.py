"""Whether OUT may be written, and where a run works until it may appear."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

from expo import disk
from expo.checkpoint.checkpoint import read_shard
from expo.checkpoint.files import open_directory
from expo.checkpoint.headers import printable
from expo.checkpoint.placing import KEPT, STAGING, is_unsettled, sweep
from expo.checkpoint.sidecars import CARD, JOURNAL, is_one_file, is_part_of_model
from expo.errors import CheckpointError, OutputError
from expo.output.manifest import manifest_of
from expo.planning.findings import listing
from expo.spec.request import Request

_PARTS = ".expo-parts"
_NOT_OURS = {STAGING, *KEPT}


def staging_path(out: Path, *, inside: bool) -> Path:
    return out / STAGING if inside else out.with_name(f".{out.name}{STAGING}")


def staging_of(out: Path) -> Path | None:
    """The staging directory that a run of OUT has made; None where there is none."""
    places = (staging_path(out, inside=inside) for inside in (False, True))
    return next(filter(Path.is_dir, places), None)


def parts_path(out: Path) -> Path:
    """Where the models of documents before the last one are made."""
    return out.with_name(f".{out.name}{_PARTS}")


def is_part(out: Path) -> bool:
    return out.parent.name.endswith(_PARTS)


def remove_parts(out: Path) -> None:
    """Remove what an interrupted run has left there, unless one is at work."""
    parts = parts_path(out)
    if parts.is_dir():
        with suppress(OutputError), disk.locked(parts, out):
            disk.remove(parts)


def check_out(out: Path, request: Request, *, overwrite: bool) -> None:
    """Refuse an OUT that holds something (unless it is a model to be replaced) or overlaps an input.

    Raises:
        OutputError: OUT is a file, not empty, or is, holds or lies in an input.
    """
    out = out.resolve()
    for reference in request.references():
        for place in (reference.model, reference.adapter):
            if place is not None and place.path is not None:
                _check_apart(out, place.path.resolve())
    check_free(out, overwrite=overwrite)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that holds something; with `overwrite` only what is not a model or an adapter.

    Raises:
        OutputError: OUT is a file, or not empty.
    """
    if is_one_file(out):
        _check_file(out, overwrite=overwrite)
        return
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a directory for the output")
    sweep(out)
    if not is_taken(out) or is_unsettled(out) or is_part(out):  # settled, or replaced, when claimed
        return
    strange = strangers(out)
    if not overwrite:
        cure = "" if strange else ", or add --overwrite"
        raise OutputError(f"{out} exists and is not empty: choose another{cure}")
    if strange:
        what = "more than a model" if _is_model(out) else "no model"
        raise OutputError(
            f"{out} holds {what}: {listing(map(printable, strange))}; --overwrite replaces models "
            "only: move these away, or choose another OUT"
        )


def _check_file(out: Path, *, overwrite: bool) -> None:
    """As `check_free`, of a model in one file."""
    work = staging_of(out)
    if not out.exists() or (work and not overwrite and _is_spent(work, out)):
        return
    if not overwrite:
        raise OutputError(f"{out} exists: choose another, or add --overwrite")
    try:
        read_shard(open_directory(out), out.name)
    except CheckpointError as error:
        raise OutputError(
            f"{out} holds no model ({error}); --overwrite replaces models only: move it away"
        ) from error


def _is_spent(work: Path, out: Path) -> bool:
    """Whether a run was cut when it had placed its file, and had only its directory left to remove."""
    return not (work / JOURNAL).exists() and not (work / out.name).exists()


def leftovers(out: Path) -> Iterator[str]:
    """What an unfinished run has left at OUT and beside it, and what becomes of it."""
    out = out.resolve()
    if is_unsettled(out):
        yield f"{out} is half placed: whatever reads or writes it next finishes that, or takes it back"
    if work := staging_of(out):
        yield f"{work} holds the work of an unfinished run: the same command resumes it"
    if (parts := parts_path(out)).is_dir():
        yield f"{parts} holds earlier documents of an unfinished run: the same command goes on from them"


def is_taken(out: Path) -> bool:
    return out.is_file() or (out.is_dir() and not is_free(out))


def is_free(out: Path) -> bool:
    """Whether OUT holds nothing, or only what an interrupted run has left."""
    return {entry.name for entry in out.iterdir()} <= _NOT_OURS


def strangers(out: Path) -> list[str]:
    """What a directory holds that is no part of a model: all of it where that is not a model at all.

    A directory in which everything is strange is one entry, with a `/` at its end.
    """
    manifest = manifest_of(out)
    named = set() if manifest is None else set(manifest.listed)
    card = (out / CARD).read_text("utf-8", "replace") if (out / CARD).is_file() else ""
    entries = list(_entries(out))
    known = {name for name in entries if name in named or is_part_of_model(name, card)}
    known = known if _is_model(out) else set()
    homes = {parent for name in known for parent in PurePosixPath(name).parents}
    return sorted({_highest(name, homes) for name in entries if name not in known})


def _entries(out: Path) -> Iterator[str]:
    """Every file, link and empty directory (with a `/`) below OUT, by its path there."""
    for folder, directories, files in os.walk(out, onerror=_unlistable):
        place = Path(folder).relative_to(out)
        if place == Path():
            directories[:] = [name for name in directories if name not in _NOT_OURS]
        links = [name for name in directories if Path(folder, name).is_symlink()]
        yield from ((place / name).as_posix() for name in sorted([*links, *files]))
        if not directories and not files and place != Path():
            yield f"{place.as_posix()}/"


def _unlistable(error: OSError) -> NoReturn:
    raise OutputError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _highest(name: str, homes: set[PurePosixPath]) -> str:
    """The highest directory above a strange entry that is not also above a known one; or the entry."""
    above = [parent for parent in PurePosixPath(name).parents if parent not in homes]
    above = [parent for parent in above if parent != PurePosixPath()]
    return f"{above[-1]}/" if above else name


def _is_model(out: Path) -> bool:
    return manifest_of(out) is not None or any(out.glob("*.safetensors"))


def _check_apart(out: Path, source: Path) -> None:
    if out == source or out in source.parents or source in out.parents:
        raise OutputError(f"{out} overlaps the input {source}: choose another place")
