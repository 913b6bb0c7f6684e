"""What `expo publish` looks at before the first byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import expo as door
from expo.checkpoint.front_matter import FrontMatter
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, HubError, SpecError, VerificationError
from expo.output.manifest import Manifest, SourceEntry
from expo.verbs.publish import prepare

from .conftest import Ran
from .hub_server import COMMIT
from .hub_writing import Fault, Repo
from .publishing import CLIENTS_OWN, LFS, NAME, SHARDS, World, edit_manifest

pytestmark = CLIENTS_OWN


@LFS
def test_visibility(world: World) -> None:
    assert world.prepare().plan.private
    world.publish(public=True)
    assert not world.repo.private
    assert "the repository is public: everybody will see the model" in world.prepare().plan.warnings
    world.hub.create(NAME)
    (warning,) = world.prepare(public=True).plan.warnings
    assert warning.startswith("the repository is private and stays so")


def with_parent(world: World, folder: Path, **more: str) -> None:
    sft, parent = (
        SourceEntry("sft", None, None, None),
        SourceEntry("org/parent", COMMIT, None, None),
    )
    sources = {"sft": sft, "aligned": parent}
    edit_manifest(world.out, sources=sources, donor="org/parent", **more)


@LFS
def test_a_gated_parent(world: World, tmp_path: Path) -> None:
    with_parent(world, tmp_path)
    world.hub.gated.add("org/parent")
    page = f"{world.hub.url}/org/parent"
    with pytest.raises(HubError, match=f"the parent org/parent is gated: open {page} with the acc"):
        world.publish()
    assert not world.hub.repos


@LFS
@pytest.mark.parametrize("status", [401, 403])
def test_a_parent_that_is_refused(world: World, tmp_path: Path, status: int) -> None:
    with_parent(world, tmp_path)
    world.hub.faults.append(Fault("parent/auth-check", status))
    with pytest.raises(HubError, match=f"org/parent is gated: open {world.hub.url}/org/parent"):
        world.publish()


@LFS
def test_parents_that_readers_cannot_open(world: World, tmp_path: Path) -> None:
    with_parent(world, tmp_path)
    warnings = world.prepare().plan.warnings
    assert "the parent org/parent is not on the Hub, or not for this account" in warnings[0]
    world.hub.repos["org/parent"] = Repo(branches={"main": COMMIT}, commits={COMMIT: {}})
    assert world.prepare().plan.warnings[0].startswith("the parent org/parent is private")


@LFS
@pytest.mark.parametrize("template", ["{{ same }}", "{{ other }}"])
def test_the_donors_chat_template(
    world: World, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    address = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", world.hub.url + address
    )
    with_parent(world, tmp_path)
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "chat_template.jinja").write_text("{{ same }}")
    (world.out / "chat_template.jinja").write_text(template)
    world.hub.repositories["org/parent"] = parent
    warned = "the chat template is not that of org/parent" in world.prepare().plan.warnings
    assert warned is (template == "{{ other }}")


def licensed(world: World, *licences: str) -> None:
    """Parents whose cards say these."""
    sources = {
        role: SourceEntry(f"our-{role}", None, None, None, said=FrontMatter(license=licence))
        for role, licence in zip(("sft", "aligned"), licences, strict=True)
    }
    edit_manifest(world.out, sources=sources)


@LFS
def test_the_licence_is_the_more_restrictive(world: World) -> None:
    licensed(world, "mit", "apache-2.0")
    assert world.prepare(licence=None).plan.licence == "apache-2.0"
    (warning,) = world.prepare(licence="mit").plan.warnings
    assert warning == "our-aligned is under apache-2.0: make sure that you may publish under mit"


@LFS
@pytest.mark.parametrize(("licences", "words"), [
    (("mit", "home-made"), "our-aligned says 'home-made', which expo does not know; say --license"),
    (("cc-by-nc-4.0", "gemma"), "and neither covers the other; say --license ID"),
    (("mit", "cc-by-nd-4.0"), "cc-by-nd-4.0, which allows no derived model: ask its authors"),
])  # fmt: skip
def test_a_licence_that_is_not_clear(world: World, licences: tuple[str, str], words: str) -> None:
    licensed(world, *licences)
    with pytest.raises(SpecError, match=words):
        world.prepare(licence=None)
    assert not world.hub.requests


@LFS
def test_what_a_licence_asks_for(world: World) -> None:
    """The beginning of the name, copies of its text, a notice, and words on the card."""
    licensed(world, "llama3", "llama3")
    with pytest.raises(SpecError, match="wants a name that begins with Llama-3: rename it, or add"):
        world.prepare(licence=None)
    for name in ("LICENSE", "USE_POLICY.md"):
        words = rf"has no {name.removesuffix('.md')} file, and its licence asks for a copy .*llama3"
        with pytest.raises(CheckpointError, match=words):
            world.prepare(licence=None, name_ok=True)
        (world.out / name).write_text("its text\n")
    (world.out / "NOTICE").write_bytes(b"Ren\xe9's line")  # neither UTF-8 nor an end of line
    world.publish(licence=None, name_ok=True)
    there = world.repo.head()
    assert {"LICENSE", "USE_POLICY.md", "NOTICE", "README.md"} <= there.keys()
    notice = (world.out / "NOTICE").read_bytes()
    assert notice.startswith(
        b"Ren\xe9's line\nMeta Llama 3 is licensed under the Meta Llama 3 Comm"
    )
    assert there["NOTICE"].content == notice
    card = str((there["README.md"].content or b"").decode())
    assert "license: llama3\n" in card
    assert "Built with Meta Llama 3" in card
    assert world.publish(licence=None, name_ok=True).bytes_sent == 0


@pytest.mark.slow
@LFS
def test_a_notice_that_travelled_may_grow(
    world: World, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    """It is listed beside the model, so that the lines which a licence asks for are no fault of it."""
    sft, aligned = (shutil.copytree(MODELS / n, tmp_path / n) for n in ("sft", "aligned"))
    (aligned / "README.md").write_text("---\nlicense: gemma\n---\n")
    (aligned / "NOTICE").write_text("theirs\n")
    world.out = door.extrapolate(sft, aligned, tmp_path / "own", alpha=1.5, verify=False).out
    assert Manifest.of_folder(world.out).beside.keys() == {"NOTICE", "README.md"}  # type: ignore[union-attr]
    world.publish(licence="gemma")
    notice = (world.out / "NOTICE").read_text()
    assert notice.startswith("theirs\nGemma is provided under")
    assert expo("verify", world.out, "--against", aligned, "-q").code == 0


@LFS
def test_the_licence_that_is_asked_for(world: World) -> None:
    world.publish(licence="cc-by-4.0")
    card = (world.out / "README.md").read_text()
    assert "\nlicense: cc-by-4.0\n" in card
    assert f'"{NAME}"' in card
    assert world.repo.head()["README.md"].content == card.encode()
    assert world.publish(licence="cc-by-4.0").bytes_sent == 0


RESULTS = {"schema": "expo.results/1", "results": [
    {"dataset": "org/bench", "task": "main", "metric": "score", "value": 8.18}]}  # fmt: skip


@LFS
def test_results_reach_the_card_and_the_hub(world: World, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    world.publish(results=tmp_path / "r.json")
    there = world.repo.head()
    assert b"**8.18**" in (there["README.md"].content or b"")
    assert b"value: 8.18" in (there[".eval_results/org--bench.yaml"].content or b"")
    assert world.publish(results=tmp_path / "r.json").bytes_sent == 0
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(SpecError, match=r"r.json: schema: Field required"):
        world.publish(results=tmp_path / "r.json")


@LFS
@pytest.mark.parametrize("text", ["---\nx: 'license: nonsense'\n---\n", "---\na: [\n---\n"])
def test_front_matter_that_the_hub_refuses(world: World, text: str) -> None:
    (world.out / "README.md").write_text(text)
    with pytest.raises(CheckpointError, match=r"README.md: its front matter is not valid: correct"):
        world.publish()
    assert not world.hub.repos


@LFS
def test_only_what_expo_has_made(world: World) -> None:
    (world.out / SHARDS[0]).unlink()
    with pytest.raises(VerificationError, match=f"{SHARDS[0]} is missing: restore it, or run"):
        world.prepare()
    (world.out / "expo.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no expo.json: expo did not make it"):
        world.prepare()


@LFS
@pytest.mark.parametrize("name", ["model", "org/name/x", "https://huggingface.co/org/model"])
def test_names_that_are_none(world: World, name: str) -> None:
    with pytest.raises(SpecError, match="is not a Hub id: name it ORG/NAME"):
        prepare(world.out, name)
