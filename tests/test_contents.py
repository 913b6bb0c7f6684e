"""Files that a download has left in place of a model's: recognised wherever they are read, with the cure."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import expo as door
from expo.checkpoint.contents import mistaken
from expo.checkpoint.files import open_directory
from expo.verification.run import judge
from expo.verification.subject import Subject

from .conftest import Pair, Ran

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 135\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang='en'>"
PULL = "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
AGAIN = "is a web page (HTML), not the file itself: download it again"


@pytest.mark.parametrize(
    "first",
    [PAGE, b"<html>", b"\xef\xbb\xbf<HTML>", b"<head>", b"<?xml version", b"Entry not found"],
)
def test_what_is_left_by_a_failed_download(first: bytes) -> None:
    assert "download it again" in str(mistaken(first))


@pytest.mark.parametrize(
    "first",
    [b"", b"{", b"[1]", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"PK\x03\x04", b"\n\x0e\n\x05<unk>",
     b"<|im_start|>", b"{{ bos_token }}", b"<s>", b"version: 1\n", b"merge_method: expo\n"],
)  # fmt: skip
def test_what_models_hold(first: bytes) -> None:
    assert mistaken(first) is None


FILES = (
    "model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
    "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("content", "says"), [(POINTER, PULL), (PAGE, AGAIN)], ids=["LFS", "HTML"])
def test_every_file_of_a_model(
    name: str, content: bytes, says: str, pair: Pair, expo: Callable[..., Ran]
) -> None:
    (pair.aligned / name).write_bytes(content)
    ran = expo("plan", pair.sft, pair.aligned)
    assert ran.err.startswith(f"expo: aligned/{name} {says}")
    assert ran.err.count("\n") == ran.code == 1


def test_a_pickle(pair: Pair, expo: Callable[..., Ran]) -> None:
    (pair.sft / "model.safetensors").unlink()
    (pair.sft / "pytorch_model.bin").write_bytes(POINTER)
    assert expo("plan", pair.sft, pair.aligned).err == f"expo: sft/pytorch_model.bin {PULL}\n"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(name: str, pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        empty = b"{}" if file.endswith("json") else b"\x02" + bytes(7) + b"{}"
        (folder / file).write_bytes(POINTER if file == name else empty)
    assert expo("plan", pair.sft, f"{pair.sft}+{folder}").err == f"expo: adapter/{name} {PULL}\n"


def test_an_adapter_configuration_that_is_not_json(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{")
    (folder / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    ran = expo("plan", pair.sft, f"{pair.sft}+{folder}")
    assert ran.err.startswith("expo: adapter/adapter_config.json is not JSON (")
    assert ran.err.endswith(": download it again\n")


def test_specs_and_vectors(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    file = tmp_path / "spec.yml"
    file.write_bytes(PAGE)
    assert expo("plan", file).err.startswith(f"expo: {file} {AGAIN}")
    file.write_bytes(POINTER)
    ran = expo("verify", tmp_path, "--vectors", file)
    assert (ran.code, ran.err) == (2, f"expo: {file} {PULL}\n")


def test_verify_says_it_once_for_all_files(pair: Pair) -> None:
    for path in pair.aligned.glob("*.safetensors"):
        path.write_bytes(POINTER)
    found = {check.name: check for check in judge(Subject(open_directory(pair.aligned))).checks}
    shards = ", ".join(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
    assert found["contents"].message == f"{shards}: each {PULL}"
    assert PULL not in "".join(c.message for name, c in found.items() if name != "contents")
    assert found["shards"].status == "skipped"


def test_one_sentence_for_shards_with_one_fault(pair: Pair) -> None:
    for path in pair.aligned.glob("*.safetensors"):
        path.write_bytes(b"")
    found = {check.name: check for check in judge(Subject(open_directory(pair.aligned))).checks}
    assert found["shards"].message.count("too short for a safetensors header") == 1
    assert "model-00001-of-00003.safetensors, " in found["shards"].message


def test_one_note_for_tensors_that_the_index_does_not_list(pair: Pair) -> None:
    path = pair.aligned / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("model.norm.weight", "lm_head.weight"):
        del index["weight_map"][name]
    path.write_text(json.dumps(index))
    (note,) = door.plan({"merge_method": "expo", "base_model": str(pair.sft),
                         "models": [{"model": str(pair.aligned), "parameters": {"alpha": 1.5}}]}).notes  # fmt: skip
    assert note == (
        "aligned: the index does not list 2 tensors, which are read: lm_head.weight, model.norm.weight"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{}"), ("tokenizer.json", "{"), ("tokenizer.model", "\x0f"), ("vocab.json", "[]"),
     ("tokenizer_config.json", "[]"), ("added_tokens.json", '{"a": {}}')],
)  # fmt: skip
def test_a_damaged_tokenizer_file_is_named(
    name: str, content: str, pair: Pair, expo: Callable[..., Ran]
) -> None:
    (pair.aligned / name).write_text(content)
    if name.startswith(("tokenizer_config", "added")):
        (pair.aligned / "vocab.json").write_text('{"a": 0}')
    for command in (("plan", pair.sft, pair.aligned), ("diff", pair.sft, pair.aligned)):
        ran = expo(*command)
        assert ran.err.startswith(f"expo: aligned/{name} is damaged (")
        assert ran.err.endswith(": download it again\n")
        assert ran.err.count("\n") == ran.code == 1
