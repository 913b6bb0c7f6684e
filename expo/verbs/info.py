"""`expo info`: what the manifest of an output holds."""

from os import PathLike
from pathlib import Path

from expo.checkpoint.sidecars import is_one_file
from expo.errors import SpecError
from expo.output.manifest import AdapterManifest, Manifest, read_manifest


def info(out: str | PathLike[str]) -> Manifest | AdapterManifest:
    """How the model or the adapter in the directory (or the one file) `out` was made, and what came of it.

    Reads `expo.json` and nothing else: whether the files are still those is `verify`'s matter.

    Raises:
        SpecError: there is no such directory.
        CheckpointError: it was not made by expo, or its `expo.json` is damaged.
    """
    folder = Path(out)
    if not folder.is_dir() and not (is_one_file(folder) and folder.exists()):
        raise SpecError(f"{folder} is no directory: name one that expo has made")
    return read_manifest(folder)
