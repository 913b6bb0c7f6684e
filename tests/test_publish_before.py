"""What `expo publish` looks at before the first byte."""

from pathlib import Path

import pytest

from expo.errors import CheckpointError, HubError, SpecError, VerificationError
from expo.output.manifest import SourceEntry
from expo.publishing import seam
from expo.verbs.publish import prepare

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
    source = SourceEntry("org/parent", COMMIT, None, None)
    edit_manifest(world.out, sources={"aligned": source}, donor="org/parent", **more)


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


@LFS
def test_the_name_that_a_licence_wants(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "terms", lambda *_: seam.Terms("llama3", "Llama 3"))
    with pytest.raises(SpecError, match="llama3 wants a name that begins with Llama 3: rename it"):
        world.prepare()
    assert world.prepare(name_ok=True).plan.licence == "llama3"
    monkeypatch.setattr(seam, "terms", lambda *_: seam.Terms("fits", "Mod"))
    assert world.prepare().plan.licence == "fits"


@LFS
def test_the_licence_that_is_asked_for(world: World) -> None:
    world.publish(licence="apache-2.0")
    card = (world.out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert world.repo.head()["README.md"].content == card.encode()
    assert world.publish(licence="apache-2.0").bytes_sent == 0


@LFS
@pytest.mark.parametrize("text", ["---\nlicense: nonsense\n---\n", "---\na: [\n---\n"])
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
    with pytest.raises(
        CheckpointError, match=r"has no expo.json: publish takes what expo has made"
    ):
        world.prepare()


@LFS
@pytest.mark.parametrize("name", ["model", "org/name/x", "https://huggingface.co/org/model"])
def test_names_that_are_none(world: World, name: str) -> None:
    with pytest.raises(SpecError, match="is not a Hub id: name it ORG/NAME"):
        prepare(world.out, name)
