"""What is ours: the directory in which a run works, and the files that a model's folder is made of."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from expo.output.staging import Staging, _not_ours_alone
from expo.planning.build import build_plan
from expo.spec.request import make_request

from .conftest import Pair, Ran, extrapolate

STAGING = ".out.expo-staging"
CURE = "have it removed, or choose another OUT"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_staging_directory_that_others_can_write_is_refused(
    mode: int, pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING).chmod(mode)
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    assert ran.code == 1
    assert ran.err == (
        f"expo: {tmp_path / STAGING} can be written by others (mode {mode & 0o777:o}), who may change what a "
        f"run writes there: {CURE}\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [STAGING, "aligned", "sft"]


def test_a_staging_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    place = Path("/")  # root's
    if os.geteuid() == 0:
        place = tmp_path / STAGING
        place.mkdir()
        os.chown(place, 65534, -1)
    owner = place.stat().st_uid
    assert _not_ours_alone(place.stat(), tmp_path) == f"belongs to another user ({owner})"
    assert _not_ours_alone(tmp_path.stat(), tmp_path) is None
    assert [p.name for p in tmp_path.iterdir()] in ([], [STAGING])


def test_where_the_disk_knows_no_owners_all_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some mounts every directory belongs to one user, whoever makes it."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert _not_ours_alone(tmp_path.stat(), tmp_path) is None


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_place_of_the_staging_directory_is_refused(
    there: bool, pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.mkdir()
    (tmp_path / STAGING).symlink_to(elsewhere)
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    assert ran.code == 1
    assert ran.err == (
        f"expo: {tmp_path / STAGING} is a link or a file, not a run's directory: remove it\n"
    )
    assert not there or list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_a_run_works_alone_and_its_output_has_the_usual_mode(
    mask: int, pair: Pair, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        with Staging(tmp_path / "other") as staging:
            assert stat.S_IMODE(staging.folder.stat().st_mode) == 0o700
        extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def link(file: Path, target: Path, content: str = "MIT") -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)
    file.symlink_to(target)


def test_a_link_out_of_the_models_folder_is_refused(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    link(pair.aligned / "LICENSE", tmp_path / "secret")
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q")
    assert ran.code == 1
    assert ran.err == (
        f"expo: aligned/LICENSE is a link to {tmp_path / 'secret'}, outside the model's folder: copy that "
        "file there if it belongs to the model, else remove the link\n"
    )
    assert not (tmp_path / "out").exists()


def test_links_within_the_models_folder_are_its_files(pair: Pair, tmp_path: Path) -> None:
    link(pair.aligned / "LICENSE", pair.aligned / "more" / "LICENSE.txt")
    (tmp_path / "named").symlink_to(pair.aligned)
    plan = build_plan(make_request(str(pair.sft), str(tmp_path / "named"), alpha=1.5))
    assert "LICENSE" in [sidecar.name for sidecar in plan.sidecars]
    assert plan.refusals == ()
    assert plan.notes == build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5)).notes


def test_links_into_the_hubs_cache_are_followed_and_said(pair: Pair, tmp_path: Path) -> None:
    link(pair.aligned / "LICENSE", tmp_path / "hub" / "models--o--n" / "blobs" / "0123")
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    assert plan.refusals == ()
    assert "links of aligned into the Hub's cache are followed: LICENSE" in plan.notes


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(pair: Pair, tmp_path: Path) -> None:
    home = tmp_path / "models--o--n"
    snapshot = home / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    pair.aligned.rename(snapshot)
    link(snapshot / "LICENSE", home / "blobs" / "4567")
    plan = build_plan(make_request(str(pair.sft), str(snapshot), alpha=1.5))
    assert plan.refusals == ()
    assert not any("Hub's cache" in note for note in plan.notes)
