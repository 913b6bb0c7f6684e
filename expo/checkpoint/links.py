"""Where the files of a local folder lie that are links: a link can bring along what is no part of the model."""

from pathlib import Path

from expo.checkpoint.files import Directory, Files


def target_outside(files: Files, name: str) -> Path | None:
    """What a link out of the model's folder leads to; None for every other file, and for the links that a
    snapshot in the Hub's cache is made of."""
    if not isinstance(files, Directory):
        return None
    root, target = files.root.resolve(), files.local_path(name).resolve()
    if target.is_relative_to(root) or (is_cached(target) and target.parents[1] in root.parents):
        return None
    return target


def is_cached(target: Path) -> bool:
    """Whether this is a file's content in a cache of the Hub: `models--…/blobs/…`."""
    home = target.parent
    return home.name == "blobs" and home.parent.name.startswith("models--")
