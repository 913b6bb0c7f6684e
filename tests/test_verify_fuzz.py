"""Verify: whatever lies in a file is a finding, never a crash."""

import json
from pathlib import Path

import pytest

from expo.verification.run import CHECKS, judge

from .clean import Clean
from .faults import FIRST

GARBAGE = (
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b"[" * 100_000,
    b'{"a": 1}',
    b"\0" * 5000,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "expo.json",
             "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", FIRST],
)  # fmt: skip
def test_whatever_is_in_a_file_is_a_finding(clean: Clean, folder: Path, name: str) -> None:
    for content in GARBAGE:
        (folder / name).write_bytes(content)
        result = judge(clean.subject(folder, "tensors"))
        assert not result.ok, content


WEIRD = (None, [], {}, "x", -1, 0, 1.5, 10**400, True, [None], [[1]], {"a": {"b": []}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "expo.json",
             "tokenizer_config.json"],
)  # fmt: skip
def test_whatever_type_a_value_has_is_a_finding(clean: Clean, folder: Path, name: str) -> None:
    original = json.loads((folder / name).read_text())
    for number, key in enumerate([*original, "chat_template", "text_config"]):
        for value in WEIRD[number % 8 :: 8]:  # each kind for every eighth key
            (folder / name).write_text(json.dumps(original | {key: value}))
            names = [check.name for check in judge(clean.subject(folder, "")).checks]
            assert names == [check.name for check in CHECKS]
