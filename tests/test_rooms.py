"""Data flows one way: what each room may import."""

import ast
from pathlib import Path

import expo

ROOT = Path(expo.__file__).parent
ORDER = (
    ("errors", "results", "threads"),
    ("operators",),
    ("checkpoint",),
    ("spec",),
    ("planning",),
    ("output",),
    ("compute", "verification", "demo", "plots"),
    ("verbs",),
    ("cli",),
)
"""Rooms import those of the lines above theirs, and none of their own line."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    modules = (node.module or "" for node in nodes if isinstance(node, ast.ImportFrom))
    return {module.split(".")[1] for module in modules if module.startswith("expo.")}


def test_imports_run_one_way() -> None:
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in imported(path) - {room}:
            # The bottom line may be used by all; its own files stand side by side.
            assert LEVEL[other] < LEVEL[room] or LEVEL[other] == 0, f"{path}: imports {other}"


def test_only_one_module_uses_mergekit_and_only_compiled_ones_numba() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "from mergekit" in text or "import mergekit" in text:
            assert path.relative_to(ROOT).as_posix() == "compute/foreign.py"
        if "from numba" in text or "import numba" in text:
            assert path.relative_to(ROOT).parts[0] == "compute"
