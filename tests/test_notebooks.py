"""Notebooks: stored with their outputs, through the public door alone, without a path of a machine."""

import ast
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
_PATH = re.compile(r"/(?:home|Users|root|tmp|work|var)/\S*")


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not {output["output_type"] for output in outputs} & {"error"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    said = "".join(text for output in outputs for text in output.get("text", ()))
    assert _PATH.findall(said) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_the_public_door(notebook: Path) -> None:
    for cell in code_cells(notebook):
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "expo"
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("expo.") for alias in node.names)
