"""A model's own code: every `.py` file that loading takes travels, and what is missing is found."""

import json
from pathlib import Path

import pytest

import expo
from expo.checkpoint.code import code_files
from expo.checkpoint.files import open_directory

from .conftest import Pair

FILES = {
    "config.json": {"auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "org/other--config_x.C"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tok_x.Slow", None]}},
    "processor_config.json": {"auto_map": {"AutoProcessor": "processing_x.P"}},
    "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "image_x.I"}},
    "generation_config.json": {"auto_map": {"AutoGenerate": "generate_x.G"}},
    "modeling_x.py": "import os\nfrom .layers import A\nfrom .deep.attention import B\nfrom . import helper, torch\n",
    "layers.py": "def f():\n    from .kernels import fast\n",
    "kernels.py": "from .layers import A\n",
    "deep/attention.py": "from ..top import C\nfrom .inner import D\n",
    "deep/inner/__init__.py": "",
    "helper.py": "this is not Python",
    **dict.fromkeys(("top.py", "tok_x.py", "processing_x.py", "image_x.py", "generate_x.py"), ""),
    "other.py": "",
    "config_x.py": "",
}  # fmt: skip
TAKEN = {name for name in FILES if name.endswith(".py")} - {"other.py", "config_x.py"}


def write(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_code_is_followed_from_every_config_through_its_imports(tmp_path: Path) -> None:
    found = code_files(open_directory(write(tmp_path)))
    assert found.keys() == TAKEN
    assert found["kernels.py"] == "layers.py"
    assert found["tok_x.py"] == "tokenizer_config.json"
    (tmp_path / "kernels.py").unlink()
    assert "kernels.py" in code_files(open_directory(tmp_path))


@pytest.mark.parametrize("entry", ["../x.T", "", ".", "/etc/passwd.X", 5, [[["a.B"]]], {"a": None}])
def test_any_auto_map_is_read(tmp_path: Path, entry: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": entry}}))
    assert not code_files(open_directory(tmp_path)).keys() & {"config.json"}


def test_code_travels_with_what_it_imports(pair: Pair, tmp_path: Path) -> None:
    write(pair.aligned)
    report = expo.plan(
        {
            "merge_method": "expo",
            "base_model": str(pair.sft),
            "models": [{"model": str(pair.aligned), "parameters": {"alpha": 1.5}}],
        }
    )
    assert set(report.sidecars) >= TAKEN
    assert {"other.py", "config_x.py"} <= report.left_behind.keys()
    assert "deep/attention.py is model code (auto_map): copied, read it first" in report.warnings
