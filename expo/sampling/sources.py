"""The files that a function's module is made of, as far as they lie with it."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_MOST = 200


def sources(file: Path, module: str) -> list[Path]:
    """The module's file, and of the modules in its folder and below those that it imports, they import, …

    Read from the import statements, so those within functions count, and nothing depends on what else runs
    in this process. Installed modules are their own only.
    """
    installed = {
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    root = file.resolve().parent
    for _ in package.split(".") if package else ():
        root = root.parent
    home = file.resolve().parent
    found: dict[Path, None] = {file.resolve(): None}
    if str(home) in installed:
        return [*found]
    todo = [(file.resolve(), package)]
    while todo and len(found) < _MOST:
        for name in _imported(*todo.pop()):
            for path in _files(root, name):
                if path not in found and path.is_relative_to(home):
                    found[path] = None
                    inner = name if path.name == "__init__.py" else name.rpartition(".")[0]
                    todo.append((path, inner))
    return sorted(found)


def _imported(file: Path, package: str) -> Iterator[str]:
    """The dotted names that the import statements of a file may mean."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            yield start
            yield from (f"{start}.{alias.name}".lstrip(".") for alias in node.names)


def _files(root: Path, name: str) -> Iterator[Path]:
    """Where a module of that name, and the packages around it, would lie."""
    parts = [part for part in name.split(".") if part.isidentifier()]
    for count in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:count])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                yield file
