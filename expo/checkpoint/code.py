"""A model's own code: the `.py` files that its configurations name, and what those import beside them."""

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

from expo.checkpoint.files import Files, read_json, read_whole
from expo.checkpoint.sidecars import is_config
from expo.errors import CheckpointError


def code_files(files: Files) -> dict[str, str]:
    """Every `.py` file that loading under `trust_remote_code` takes from this place, and what names it.

    Those that are named but not there are among them; those of other repositories
    (`repo--file.Class`) are not.
    """
    found: dict[str, str] = {}
    waiting = [(f"{file}.py", config) for config, file in _named(files)]
    while waiting:
        name, by = waiting.pop(0)
        if name not in found:
            found[name] = by
            if name in files.sizes:
                waiting += [(other, name) for other in _imported(files, name)]
    return found


def auto_map_entries(files: Files) -> Iterator[tuple[str, str]]:
    """(configuration, entry) of every `auto_map`: `file.Class` or `repo--file.Class`."""
    for name in filter(is_config, files.sizes):
        try:
            entries = read_json(files, name).get("auto_map")
        except CheckpointError:
            continue  # that it is damaged is another's matter
        yield from ((name, entry) for entry in _texts(entries))


def _named(files: Files) -> Iterator[tuple[str, str]]:
    entries = auto_map_entries(files)
    return ((name, entry.split(".")[0]) for name, entry in entries if "--" not in entry)


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list() | dict():
            for item in value.values() if isinstance(value, dict) else value:
                yield from _texts(item)


def _imported(files: Files, name: str) -> Iterator[str]:
    """The files of `from .module import x` and `from . import module`, as Python finds them."""
    try:
        tree = ast.parse(read_whole(files, name))
    except (CheckpointError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(PurePosixPath(name).parts):
            folder = PurePosixPath(name).parents[node.level - 1]
            if node.module is not None:
                yield _module(files, folder / node.module.replace(".", "/"))
            else:
                found = [_module(files, folder / alias.name) for alias in node.names]
                yield from (other for other in found if other in files.sizes)


def _module(files: Files, path: PurePosixPath) -> str:
    package = f"{path}/__init__.py"
    return package if package in files.sizes else f"{path}.py"
