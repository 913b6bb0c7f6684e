"""Several merges in order, the later ones of what the earlier ones gave."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from expo.errors import CheckpointError, SpecError
from expo.output.claim import check_free
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

    The last stage becomes `out`. Those before it are made beside it and go when it is done or refused;
    an interrupted run resumes the stage that it was at, after making the ones before it again.

    Args:
        run: makes one merge: (request, its place, whether it is one of those before the last).
        overwrite: whether `out` may hold a model, which the last merge replaces.

    Raises:
        OutputError: `out` is taken. It is found before the first merge runs.
    """
    check_free(out.resolve(), overwrite=overwrite)
    *before, last = stages
    parts = out.with_name(f".{out.name}.expo-parts")
    outputs: dict[str, Path] = {}
    try:
        for stage in before:
            assert stage.name is not None
            place = parts / stage.name
            run(stage.request(outputs), place, True)
            outputs[stage.name] = place
        result = run(last.request(outputs), out, False)
    except (CheckpointError, SpecError):
        shutil.rmtree(parts, ignore_errors=True)
        raise
    shutil.rmtree(parts, ignore_errors=True)
    return result
