"""`--include`: what it adds has names of its own, none that the output or its journal needs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Pair, Ran
from .test_merge import digest

SHARD = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    "name",
    ["journal.jsonl", "JOURNAL.jsonl", "expo.json", "README.md", SHARD, f"{SHARD}.partial", "model.old.safetensors",
     "model.safetensors.index.json", ".expo-notes", ".expo-work/x"],
)  # fmt: skip
def test_names_that_the_output_needs_are_refused(
    name: str, pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    file = pair.aligned / name
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    run = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    ran = expo(*run, "--include", f"{name[:-1]}?")
    assert ran.code == 1
    assert ran.err == (
        f"expo: --include adds {name}, whose names the output needs for its own files: narrow the pattern\n"
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["aligned", "sft"]
    assert expo(*run).code == 0


def test_other_names_are_copied_byte_for_byte(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    names = ("notes.partial", "my-journal.jsonl", "head/value.safetensors", "docs/README.md")
    for name in names:
        (pair.aligned / name).parent.mkdir(exist_ok=True)
        (pair.aligned / name).write_text(name)
    included = [word for name in names for word in ("--include", name)]
    out = tmp_path / "out"
    ran = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5, "-q", *included)
    assert ran.code == 0, ran.err
    assert {n: h for n, h in digest(pair.aligned).items() if n in names}.items() <= digest(
        out
    ).items()
