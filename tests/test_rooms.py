"""Data flows one way: what each room may import."""

import ast
from pathlib import Path

import expo

ROOT = Path(expo.__file__).parent
ORDER = (
    ("disk", "errors", "results", "temporary", "threads"),
    ("operators",),
    ("checkpoint",),
    ("spec",),
    ("planning",),
    ("output",),
    ("compute", "verification", "demo", "plots"),
    ("sampling",),
    ("distribution", "evaluation", "publishing", "sweeping"),
    ("verbs",),
    ("cli",),
)
"""Rooms import those of the lines above theirs, and none of their own line."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules(path: Path) -> set[str]:
    """What a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return named | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_imports_run_one_way() -> None:
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        others = {name.split(".")[1] for name in modules(path) if name.startswith("expo.")}
        for other in others - {room}:
            # The bottom line may be used by all; its own files stand side by side.
            assert LEVEL[other] < LEVEL[room] or LEVEL[other] == 0, f"{path}: imports {other}"


def test_one_module_uses_mergekit_and_one_room_numba() -> None:
    for path in ROOT.rglob("*.py"):
        packages = {name.partition(".")[0] for name in modules(path)}
        place = path.relative_to(ROOT)
        assert "mergekit" not in packages or place.as_posix() == "compute/foreign.py"
        assert "numba" not in packages or place.parts[0] == "compute"


def test_one_module_changes_an_output_on_the_disk() -> None:
    """So that a recording of it (`tests/crashes.py`) holds everything."""
    changes = {"write_text", "write_bytes", "unlink", "rename", "mkdir", "rmdir", "rmtree", "touch",
               "pwrite", "ftruncate", "truncate", "fsync", "posix_fallocate"}  # fmt: skip
    for path in [*(ROOT / "output").glob("*.py"), ROOT / "checkpoint" / "placing.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in changes:
                home = node.value.id if isinstance(node.value, ast.Name) else ""
                assert home == "disk", f"{path}:{node.lineno}: {node.attr}"
