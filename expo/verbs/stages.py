"""Several merges in order, the later ones of what the earlier ones gave."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from expo import disk
from expo.checkpoint.placing import is_unsettled
from expo.errors import HubError, OutputError
from expo.output.claim import check_free, is_taken, parts_path, remove_parts
from expo.output.durable import unwritable
from expo.spec.request import Request
from expo.spec.stages import Stage

Result = TypeVar("Result")


def run_stages(
    stages: list[Stage],
    out: Path,
    run: Callable[[Request, Path, bool], Result],
    *,
    overwrite: bool = False,
) -> Result:
    """Run every stage; the last result.

    The last stage becomes `out`. Those before it are made beside it and go when it is done or refused; an
    interrupted run goes on at the stage that it was at.

    Args:
        run: makes one merge: (request, its place, whether it is one of those before the last).
        overwrite: whether `out` may hold a model, which the last merge replaces.

    Raises:
        OutputError: `out` is taken. It is found before the first merge runs.
    """
    place, parts = out.resolve(), parts_path(out)
    if is_taken(place) and not (overwrite or is_unsettled(place)):
        remove_parts(place)  # an earlier run had nothing else left to do
    check_free(place, overwrite=overwrite)
    try:
        disk.make_directories(parts)
        with disk.locked(parts, out):
            return _run_all(stages, parts, out, run)
    except OSError as error:
        raise unwritable(error, out) from error


def _run_all(
    stages: list[Stage], parts: Path, out: Path, run: Callable[[Request, Path, bool], Result]
) -> Result:
    *before, last = stages
    outputs: dict[str, Path] = {}
    try:
        for stage in before:
            assert stage.name is not None
            place = parts / stage.name
            run(stage.request(outputs), place, True)
            outputs[stage.name] = place
        result = run(last.request(outputs), out, False)
    except Exception as error:
        resumes = (OutputError, HubError, OSError)
        if not (isinstance(error, resumes) or isinstance(error.__cause__, OSError)):
            disk.remove(parts)
        raise
    disk.remove(parts)
    return result
