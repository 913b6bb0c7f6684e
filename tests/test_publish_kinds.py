"""Publishing what is signed, and what is an adapter."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import expo as door
from expo.demo.toy import MODELS
from expo.errors import SpecError
from expo.output.manifest import AdapterManifest, SourceEntry, read_manifest
from expo.publishing.card import card
from expo.publishing.presentation import HEAT_MAP
from expo.publishing.signature import check_signature
from expo.verbs.publish import prepare

from .conftest import Ran
from .hub_server import COMMIT
from .hub_writing import Repo
from .publishing import LFS, NAME, World
from .test_formats import tiny_model, trained_adapter
from .test_signature import write_keys

pytestmark = pytest.mark.filterwarnings("ignore")


@LFS
def test_signed_last_and_sent(world: World, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    (world.out / "README.md").unlink()  # written by publish, before the signature
    result = world.publish(sign=private)
    assert check_signature(world.out, public).status == "pass"
    there = world.repo.head()["model.sig"].content
    assert there == (world.out / "model.sig").read_bytes()
    assert result.files.keys() == world.prepare(signs=True).plan.skip.keys()
    again = world.publish(sign=private)
    assert (again.commit, again.bytes_sent) == (result.commit, 0)
    other, theirs = write_keys(tmp_path, "other")
    world.publish(sign=other)  # takes the place of the first
    assert check_signature(world.out, theirs).status == "pass"
    assert world.repo.head()["model.sig"].content == (world.out / "model.sig").read_bytes()


@LFS
def test_no_signature_that_would_not_hold(world: World, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    world.publish(sign=private)
    world.publish()  # it still holds, and stays
    assert "model.sig" in world.repo.head()
    with pytest.raises(
        SpecError, match=r"sig would not hold: README.md is written anew: add --sign"
    ):
        world.publish(licence="mit")
    card = world.out / "README.md"
    kept = card.read_text()
    card.write_text(f"{kept}\nMy own words.\n")
    with pytest.raises(SpecError, match=r"would not hold: README.md is not the file that was sign"):
        world.publish()
    card.write_text(kept)
    world.publish(licence="mit", sign=private)
    assert check_signature(world.out, public).status == "pass"
    (world.out / "scratch.txt").write_text("mine")
    with pytest.raises(SpecError, match=r"and scratch.txt is not published: move it elsewhere"):
        world.publish(sign=private)
    (world.out / "scratch.txt").unlink()
    world.hub.create(NAME, {"notes.md": b"theirs"})
    (warning,) = world.prepare(signs=True).plan.warnings
    assert warning == "notes.md stays on the branch, and the signature does not cover it"


@LFS
def test_a_key_that_cannot_sign_is_told_before_anything_is_asked(
    world: World, tmp_path: Path
) -> None:
    _, public = write_keys(tmp_path)
    with pytest.raises(SpecError, match="cannot be used as a private EC key in PEM"):
        prepare(world.out, NAME, sign=public)
    assert not world.hub.requests


@pytest.mark.slow
@LFS
def test_every_flag_at_once(
    world: World, made_real: Path, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    """A model that verifies, with results, a heat map, a notice and a signature; the second time nothing is sent."""
    world.out = Path(shutil.copytree(made_real, tmp_path / "real"))
    private, public = write_keys(tmp_path)
    (tmp_path / "r.json").write_text(
        '{"schema": "expo.results/1", "results": [{"dataset": "a/b", "task": "t", "metric": "m", "value": 1}]}'
    )
    line = ("publish", world.out, NAME, "--license", "gemma", "--results", tmp_path / "r.json", "--sign", private)  # fmt: skip
    ran = expo(*line, "--yes")
    assert ran.code == 0, ran.err
    assert "signs      all that is published: model.sig\n" in ran.err
    beside = {"NOTICE", "model.sig", "expo-heatmap.png", ".eval_results/a--b.yaml"}
    assert beside <= world.repo.head().keys()
    assert expo("verify", world.out, "--signature", public, "-q").code == 0
    commits = len(world.repo.commits)
    assert "0 bytes sent" in expo(*line, "--yes").out
    assert len(world.repo.commits) == commits


def on_the_hub(world: World, out: Path, base: str) -> None:
    """As if the adapter had been made from a model there."""
    world.hub.repos[base] = Repo(branches={"main": COMMIT}, commits={COMMIT: {}})
    manifest = read_manifest(out)
    assert isinstance(manifest, AdapterManifest)
    sft = SourceEntry(base, COMMIT, None, None)
    changed = replace(manifest, sources=manifest.sources | {"sft": sft})
    (out / "expo.json").write_text(changed.to_json())


@LFS
def test_an_adapter_is_published_like_a_model(
    world: World, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    base, lora, out = (tmp_path / name for name in ("base", "lora", "scaled"))
    tiny_model().save_pretrained(base)
    trained_adapter(base, lora, 1)
    (lora / "LICENSE").write_text("its licence")
    door.extrapolate_adapter(base, f"{base}+{lora}", out, alpha=1.5)
    on_the_hub(world, out, "org/base")
    private, public = write_keys(tmp_path)
    ran = expo("publish", out, NAME, "--license", "mit", "--yes", "--sign", private)
    assert ran.code == 0, ran.err
    there = world.repo.head()
    names = {"adapter_model.safetensors", "adapter_config.json", "LICENSE", "model.sig"}
    assert names <= there.keys()
    data = ModelCard((there["README.md"].content or b"").decode()).data.to_dict()
    assert (data["library_name"], data["license"]) == ("peft", "mit")
    assert (data["base_model"], data["base_model_relation"]) == (["org/base"], "adapter")
    assert expo("verify", out, "--signature", public, "-q").code == 0
    (out / "adapter_model.safetensors").write_bytes(b"")
    assert expo("publish", out, NAME, "--license", "mit", "--yes").code == 3


def test_the_card_of_an_adapter_shows_its_heat_map(tmp_path: Path) -> None:
    door.extract_lora(MODELS / "aligned", tmp_path / "out", minus=MODELS / "sft", rank=2)
    text = card(read_manifest(tmp_path / "out"), image=HEAT_MAP)
    assert f"]({HEAT_MAP})" in text
