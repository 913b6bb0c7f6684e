"""Publishing over a bad line and past a bad server: the branch holds the whole manifest, or what it held before
and one clear line says why; and the same command goes on from there."""

import re
from collections.abc import Iterator

import pytest

from expo.errors import ExpoError, HubError
from expo.verbs.publish import send

from .hub_writing import SIGNATURE, Account, Fault
from .publishing import CLIENTS_OWN, NAME, TOKEN, World

pytestmark = CLIENTS_OWN

HUB_IS_OLD = {"model.safetensors": b"old" * 900, "notes.md": b"kept"}


def requests_of(world: World) -> list[str]:
    """Those of a publish without faults, to a repository of an older model."""
    world.publish()
    asked = [line for line in world.hub.asked() if "harnesses" not in line]
    world.hub.requests.clear()
    return asked


def start_again(world: World) -> None:
    """The older model is back, the store is empty, nothing is wrong."""
    world.hub.create(NAME, HUB_IS_OLD)
    world.hub.store = {
        k: v for k, v in world.hub.store.items() if v == HUB_IS_OLD["model.safetensors"]
    }
    world.hub.faults.clear()


def outcome(world: World) -> str:
    """ "published" or the one line; the branch is whole either way, and has one commit more at most."""
    before = dict(world.repo.head())
    try:
        world.publish()
        said = "published"
    except ExpoError as error:
        said = str(error)
    world.hub.faults.clear()
    assert len(world.repo.commits) <= 2
    assert world.is_published() or world.repo.head() == before
    assert said == "published" or re.fullmatch(r"[^\n]{20,400}", said)
    assert (said == "published") <= world.is_published()
    assert TOKEN not in said
    assert SIGNATURE not in said
    return said


def goes_on(world: World) -> None:
    """The same command, when the trouble is over."""
    world.publish()
    assert world.is_published()
    assert len(world.repo.commits) == 2
    assert "notes.md" in world.repo.head()
    assert "model.safetensors" not in world.repo.head()


def each_request(world: World) -> Iterator[tuple[str, int]]:
    start_again(world)
    asked = requests_of(world)
    assert len(asked) >= (16 if world.hub.xet is None else 12)
    for number, request in enumerate(asked):
        start_again(world)
        yield request, number


@pytest.mark.parametrize("kind", ["cut", "lost", 500, 503])
def test_a_fault_in_any_request(world: World, kind: str | int) -> None:
    for request, number in each_request(world):
        world.hub.faults.append(Fault(r"^(?!.*harnesses)", kind, number))
        said = outcome(world)
        if "/commit/" in request or "/preupload/" in request or "/lfs/" in request:
            assert said == "published", request
        goes_on(world)


def test_a_request_that_never_gets_through(world: World) -> None:
    for request, number in each_request(world):
        world.hub.faults.append(Fault(f"^{re.escape(request)}$", "cut", times=1000))
        said = outcome(world)
        assert said != "published", (request, number)
        assert "broke" in said
        goes_on(world)


def test_too_many_requests_are_waited_out(world: World) -> None:
    for request, number in each_request(world):
        world.waits.clear()
        world.hub.faults.append(
            Fault(r"^(?!.*harnesses)", 429, number, headers={"Retry-After": "7"})
        )
        said = outcome(world)
        assert said == "published" or "the Hub asks for fewer requests" in said
        if "/commit/" in request:
            assert (said, max(world.waits)) == ("published", 7.0)
        goes_on(world)


def test_a_commit_is_tried_again_when_the_hub_says_when(world: World) -> None:
    world.hub.create(NAME, HUB_IS_OLD)
    world.hub.faults.append(Fault("/commit/", 429, headers={"Retry-After": "7"}))
    assert world.publish().commit == world.repo.branches["main"]
    assert 7.0 in world.waits


def test_a_lost_answer_to_the_commit_is_found_in_the_tree(world: World) -> None:
    world.hub.create(NAME, HUB_IS_OLD)
    world.hub.faults.append(Fault("/commit/", "lost"))
    result = world.publish()
    assert result.commit == world.repo.branches["main"]
    assert sum("/commit/" in line for line in world.hub.asked()) == 1
    assert len(world.repo.commits) == 2


def test_a_lost_answer_and_nobody_to_ask(world: World) -> None:
    world.hub.create(NAME, HUB_IS_OLD)
    world.hub.faults += [Fault("/commit/", "lost"), Fault("GET .*/revision/main", "cut", 2, 99)]
    with pytest.raises(HubError, match=r"broke.*: run the same command again"):
        world.publish()
    world.hub.faults.clear()
    again = world.publish()
    assert (again.bytes_sent, len(world.repo.commits)) == (0, 2)


def test_a_lost_answer_to_a_pull_request_opens_no_second_one(world: World) -> None:
    world.hub.create(NAME, HUB_IS_OLD)
    world.hub.faults.append(Fault("/commit/", "lost"))
    first = world.publish(create_pr=True)
    again = world.publish(create_pr=True)
    assert first.pull_request == again.pull_request == f"{world.hub.url}/{NAME}/discussions/1"
    assert [b for b in world.repo.branches if b != "main"] == ["refs/pr/1"]
    assert set(world.repo.head()) == {".gitattributes", *HUB_IS_OLD}


def test_others_who_commit_meanwhile(world: World) -> None:
    world.hub.create(NAME, HUB_IS_OLD)
    ready = world.prepare()
    world.repo.add("main", world.repo.head(), world.repo.branches["main"])
    with pytest.raises(HubError, match="got other commits since it was looked at: run the same"):
        send(ready)
    assert not any("PUT" in line or "xet-write" in line for line in world.hub.asked())
    assert world.publish().bytes_skipped == 0
    assert world.is_published()


class _Meddler(Fault):
    """Commits to the branch itself when a request comes."""

    world: World

    def strikes(self, request: str) -> bool:
        if "/commit/" in request and not self.seen:
            self.seen = 1
            repo = self.world.repo
            repo.add("main", repo.head(), repo.branches["main"])
        return False


def test_a_stale_parent(world: World) -> None:
    world.hub.create(NAME, HUB_IS_OLD)
    meddler = _Meddler("", 0)
    meddler.world = world
    world.hub.faults.append(meddler)
    with pytest.raises(HubError, match="got other commits since it was looked at"):
        world.publish()
    assert set(world.repo.head()) == {".gitattributes", *HUB_IS_OLD}
    world.publish()
    assert world.is_published()
    assert world.hub.bodies in (0, sum(p.stat().st_size for p in world.out.glob("*.safetensors")))


def test_a_wrong_hash_on_the_hub_is_named(world: World) -> None:
    name = "model-00002-of-00003.safetensors"
    world.hub.believes[name] = "0" * 64
    with pytest.raises(HubError, match=rf"{name} has the hash 0{{12}}…, not .*: do not use that"):
        world.publish()
    world.hub.believes.clear()
    world.publish()
    assert world.is_published()


def test_an_expired_token(world: World) -> None:
    world.hub.accounts.clear()
    with pytest.raises(HubError, match="the token is invalid or has expired: `hf auth login`, or"):
        world.publish()


def test_a_token_that_expires_under_way(world: World) -> None:
    world.hub.create(NAME)
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    world.hub.faults.append(Fault("/commit/", 401, headers=message))
    with pytest.raises(
        HubError, match=f"the commit to {NAME}: the token is invalid or has expired"
    ):
        world.publish()
    world.publish()
    assert world.is_published()


def test_no_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(world.out / "none"))
    with pytest.raises(HubError, match="there is no token: `hf auth login`, or set HF_TOKEN"):
        world.publish()


READ_ONLY = "the token of ada is for reading only: take one with write access from http"


def test_a_read_only_token(world: World) -> None:
    world.hub.accounts[TOKEN] = Account(role="read")
    with pytest.raises(HubError, match=f"{NAME} cannot be created: {READ_ONLY}"):
        world.publish()
    world.hub.create(NAME)
    with pytest.raises(HubError, match=f"{NAME} cannot be written: {READ_ONLY}"):
        world.publish()
    assert not any(line.startswith("PUT") for line in world.hub.asked())


def test_somebody_elses_repository(world: World) -> None:
    world.hub.create(NAME, owners=frozenset({"eve"}))
    with pytest.raises(HubError, match=r"ada has no write access to it: .* or add --create-pr"):
        world.publish()
    assert world.publish(create_pr=True).pull_request


def test_somebody_elses_namespace(world: World) -> None:
    world.hub.accounts[TOKEN] = Account(orgs=())
    with pytest.raises(HubError, match="ada is no member of org: name another ORG"):
        world.publish()


def test_a_fine_grained_token_that_may_not_create(world: World) -> None:
    world.hub.accounts[TOKEN] = Account(role="fineGrained", orgs=())
    with pytest.raises(HubError, match=f"{NAME} cannot be created: this token may not do that"):
        world.publish()


def test_a_store_that_garbles_is_told_before_the_commit(world: World) -> None:
    if world.hub.xet is not None:
        pytest.skip("Xet's store is written by the client itself")
    world.hub.create(NAME, HUB_IS_OLD)
    world.hub.faults.append(Fault("POST /verify", 422))
    with pytest.raises(HubError, match="the Hub refuses what was sent"):
        world.publish()
    assert set(world.repo.head()) == {".gitattributes", *HUB_IS_OLD}


def test_a_gitignore_on_the_branch_thins_nothing_out(world: World) -> None:
    world.hub.create(NAME, {".gitignore": b"*.safetensors\n*.json"})
    world.publish()
    assert world.is_published()
