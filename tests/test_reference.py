"""What a user may write for a model."""

from pathlib import Path

import pytest

from expo.checkpoint.reference import parse_loadable, parse_reference
from expo.errors import SpecError


def test_hub_ids() -> None:
    reference = parse_reference("org/name@main")
    assert (reference.model.repo_id, reference.model.revision) == ("org/name", "main")
    assert parse_reference("hf://org/name").model.repo_id == "org/name"


def test_what_exists_as_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_reference("org/name").model.path == Path("org/name")
    assert parse_reference("hf://org/name").model.repo_id == "org/name"
    assert parse_reference("./org/name").model.path == Path("org/name")


def test_an_adapter_follows_a_plus(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "lora").mkdir()
    reference = parse_reference(f"{tmp_path}/base+{tmp_path}/lora")
    assert reference.model.path == tmp_path / "base"
    assert reference.adapter is not None
    assert reference.adapter.path == tmp_path / "lora"
    hub = parse_reference("org/base@v1+org/lora@v2")
    assert hub.adapter is not None
    assert (hub.model.revision, hub.adapter.revision) == ("v1", "v2")


def test_a_plus_in_a_directory_name_is_not_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert parse_reference(f"{tmp_path}/a+b").adapter is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "./nowhere",
        "/nowhere/at/all",
        "a/b/c",
        "org/name@",
        "org/..",
        "../x",
        "o rg/x",
        "org/\x1b",
    ],
)
def test_what_is_neither_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError):
        parse_reference(text)


def test_a_file_is_a_model_by_its_name(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin"):
        (tmp_path / name).touch()
    file = tmp_path / "model.safetensors"
    assert parse_reference(str(file)).model.path == file
    with pytest.raises(SpecError, match="is a file; name the directory"):
        parse_reference(str(tmp_path / "model.bin"))
    with pytest.raises(SpecError, match="is a file; name the directory that holds the model"):
        parse_loadable(str(file), role="MODEL")
    with pytest.raises(SpecError, match="is a file; name the directory that holds the adapter"):
        parse_reference(f"{tmp_path}+{file}")
