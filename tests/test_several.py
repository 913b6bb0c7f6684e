"""One merge at several α: `--alphas` makes an output for each from one read of the models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import expo as door
from expo.errors import OutputError, SpecError
from expo.output.staging import Staging
from expo.verbs.several import place_at

from .conftest import Pair, Ran, weights, write_checkpoint
from .test_merge import assert_same, digest, load, naive

Expo = Callable[..., Ran]


def named(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "out" in path.name)


def spec_of(pair: Pair, **more: object) -> Path:
    path = pair.sft.parent / "spec.yml"
    models = [{"model": str(pair.aligned), "parameters": {"alpha": 1.1}}]
    spec = {"merge_method": "expo", "base_model": str(pair.sft), "models": models, **more}
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.mark.parametrize("verb", ["extrapolate", "merge"])
def test_several_outputs_are_those_of_several_runs(
    pair: Pair, tmp_path: Path, expo: Expo, verb: str
) -> None:
    models = (pair.sft, pair.aligned) if verb == "extrapolate" else (spec_of(pair),)
    ran = expo(verb, *models, tmp_path / "out", "--alphas", "2,1.2,1.2")
    assert ran.code == 0, ran.err
    assert named(tmp_path) == ["out-alpha-1.2", "out-alpha-2"]
    for alpha in (1.2, 2.0):
        out = place_at(tmp_path / "out", alpha)
        assert_same(load(out), naive(pair.sft_tensors, pair.aligned_tensors, alpha))
        manifest = json.loads((out / "expo.json").read_text())
        assert manifest["alpha"] == alpha
        alone = tmp_path / f"alone-{alpha}"
        door.extrapolate(pair.sft, pair.aligned, alone, alpha=alpha, verify=False)
        assert {name: sha for name, sha in digest(out).items() if name != "README.md"} == {
            name: sha for name, sha in digest(alone).items() if name != "README.md"
        }
    assert ran.out.count("asked  ExPO") == 2
    assert "out-alpha-1.2: not verified" in ran.out


def test_json_is_a_list_in_the_order_of_alpha(pair: Pair, tmp_path: Path, expo: Expo) -> None:
    ran = expo("merge", spec_of(pair), tmp_path / "out", "--alphas", "1.5:1.7:0.1", "--json")
    results = json.loads(ran.out)
    assert [result["alpha"] for result in results] == [1.5, 1.6, 1.7]
    assert [Path(result["out"]).name for result in results] == [
        "out-alpha-1.5", "out-alpha-1.6", "out-alpha-1.7",
    ]  # fmt: skip
    one = expo("merge", spec_of(pair), tmp_path / "one", "--alphas", "1.5", "--json")
    assert [Path(result["out"]).name for result in json.loads(one.out)] == ["one-alpha-1.5"]


@pytest.mark.parametrize("verb", ["plan", "extrapolate"])
def test_the_plan_shows_every_output_and_what_they_need_together(
    pair: Pair, tmp_path: Path, expo: Expo, verb: str
) -> None:
    how = ["--out", tmp_path / "out"] if verb == "plan" else [tmp_path / "out", "--dry-run"]
    asked = (verb, pair.sft, pair.aligned, *how, "--alphas", "1.2,1.3")
    text = expo(*asked).out
    assert "alpha 1.2 (paper alpha 0.2) to alpha 1.3 (paper alpha 0.3)" in text
    lines = [line for line in text.splitlines() if line.startswith("output")]
    assert [Path(line.split()[1].strip(":")).name for line in lines] == [
        "out-alpha-1.2", "out-alpha-1.3",
    ]  # fmt: skip
    reports = json.loads(expo(*asked, "--json").out)
    assert [(r["alpha"], Path(r["out"]).name) for r in reports] == [
        (1.2, "out-alpha-1.2"),
        (1.3, "out-alpha-1.3"),
    ]
    assert f"{2 * reports[0]['write_bytes'] / 1e3:.2f} KB in 6 files" in text
    one = json.loads(expo("plan", pair.sft, pair.aligned, "--alpha", "1.2", "--json").out)
    assert reports[0]["memory_bytes"] > one["memory_bytes"]
    assert not named(tmp_path)


def test_all_outputs_need_room_together(
    pair: Pair, tmp_path: Path, expo: Expo, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = json.loads(expo("plan", pair.sft, pair.aligned, "--alphas", "1.2", "--json").out)
    free = one["write_bytes"] * 2 - 1
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    asked = (pair.sft, pair.aligned, tmp_path / "out", "--alphas", "1.2,1.3")
    ran = expo("extrapolate", *asked)
    assert ran.code == 1
    assert "is too full" in ran.err
    assert not named(tmp_path)
    planned = expo("extrapolate", *asked, "--dry-run")
    assert planned.code == 1
    assert "refused    the disk of" in planned.out
    assert expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", "1.2").code == 0


def test_one_that_is_taken_refuses_all_before_the_first_byte(
    pair: Pair, tmp_path: Path, expo: Expo
) -> None:
    taken = tmp_path / "out-alpha-1.5"
    door.extrapolate(pair.sft, pair.aligned, taken, alpha=1.4, verify=False)
    before = digest(taken)
    asked = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alphas", "1.2,1.5")
    ran = expo(*asked)
    assert ran.code == 1
    assert f"{taken} exists and is not empty" in ran.err
    assert named(tmp_path) == ["out-alpha-1.5"]
    assert digest(taken) == before
    assert expo(*asked, "--overwrite").code == 0
    assert_same(load(taken), naive(pair.sft_tensors, pair.aligned_tensors, 1.5))


def test_a_run_killed_between_two_placements_is_resumed(
    pair: Pair, tmp_path: Path, expo: Expo, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alphas", "1.2,1.5")
    with monkeypatch.context() as patch:
        place = Staging.place

        def killed(self: Staging) -> None:
            if self.out.name == "out-alpha-1.5":
                raise KeyboardInterrupt
            place(self)

        patch.setattr(Staging, "place", killed)
        ran = expo(*asked)
        assert ran.code == 130
        assert "run the same command again to resume" in ran.err
    first = digest(tmp_path / "out-alpha-1.2")
    ran = expo(*asked)
    assert ran.code == 0, ran.err
    assert "there already, of this very merge: out-alpha-1.2" in ran.err
    assert digest(tmp_path / "out-alpha-1.2") == first
    assert named(tmp_path) == ["out-alpha-1.2", "out-alpha-1.5"]
    assert_same(
        load(tmp_path / "out-alpha-1.5"), naive(pair.sft_tensors, pair.aligned_tensors, 1.5)
    )
    assert ran.out.count("asked  ExPO") == 2
    again = expo(*asked)  # nothing is left to do, so the places are taken, as one would be
    assert again.code == 1
    assert "out-alpha-1.2 exists and is not empty" in again.err


def test_python_gets_a_tuple(pair: Pair, tmp_path: Path) -> None:
    results = door.merge(spec_of(pair), tmp_path / "out", alphas=[1.5, 1.2], verify=False)
    assert [(result.alpha, result.out.name) for result in results] == [
        (1.2, "out-alpha-1.2"),
        (1.5, "out-alpha-1.5"),
    ]
    with pytest.raises(SpecError, match="none is given"):
        door.merge(spec_of(pair), tmp_path / "out", alphas=[])
    with pytest.raises(OutputError, match=r"out-alpha-1\.2 exists"):
        door.merge(spec_of(pair), tmp_path / "out", alphas=[1.2], verify=False)


def test_between_the_models_only_when_it_is_meant(pair: Pair, tmp_path: Path, expo: Expo) -> None:
    asked = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alphas", "0.3,1.3")
    ran = expo(*asked)
    assert ran.code == 2
    assert "alpha 0.3 lies between SFT and aligned" in ran.err
    assert expo(*asked, "--interpolate").code == 0
    assert named(tmp_path) == ["out-alpha-0.3", "out-alpha-1.3"]
    with pytest.raises(SpecError, match="between SFT and aligned"):
        door.merge(spec_of(pair), tmp_path / "x", alphas=[0.5])
    results = door.merge(
        spec_of(pair), tmp_path / "x", alphas=[0.5], interpolate=True, verify=False
    )
    assert results[0].out.name == "x-alpha-0.5"


def test_a_warning_about_alpha_is_that_of_its_output(pair: Pair, tmp_path: Path) -> None:
    below, beyond = door.merge(spec_of(pair), tmp_path / "out", alphas=[-0.5, 1.5], verify=False)
    assert any("is negative" in warning for warning in below.warnings)
    assert not any("is negative" in warning for warning in beyond.warnings)


REFUSED = [
    ({"merge_method": "linear", "dtype": "float32"}, "linear has no alpha"),
    ({"merge_method": "nearswap", "parameters": {"t": 0.5}}, "nearswap has no alpha"),
]


@pytest.mark.parametrize(("spec", "why"), REFUSED)
def test_other_methods_have_no_alpha(
    pair: Pair, tmp_path: Path, expo: Expo, spec: dict, why: str
) -> None:
    models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (pair.sft, pair.aligned)]
    path = tmp_path / "other.yml"
    path.write_text(yaml.safe_dump({"models": models, **spec}))
    if spec["merge_method"] == "nearswap":
        value = {**spec, "base_model": str(pair.sft), "models": [{"model": str(pair.aligned)}]}
        path.write_text(yaml.safe_dump(value))
    ran = expo("merge", path, tmp_path / "out", "--alphas", "1.2,1.3")
    assert ran.code == 2
    assert why in ran.err
    assert ran.err.count("\n") == 1


def test_what_several_alphas_do_not_go_with(pair: Pair, tmp_path: Path, expo: Expo) -> None:
    spec = spec_of(pair)
    two = tmp_path / "two.yml"
    two.write_text(f"name: first\n{spec.read_text()}---\n{spec.read_text()}")
    pairs = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out")
    for words, why in (
        (("merge", two, tmp_path / "out", "--alphas", "1.2"), "the spec has 2 documents"),
        (("plan", two, "--alphas", "1.2"), "the spec has 2 documents"),
        (("plan", spec, "--resolved", "--alphas", "1.2"), "not with --resolved"),
        ((*pairs, "--alphas", "1.2", "--alpha", "1.3"), "one of them"),
        ((*pairs, "--alphas", "1.2", "--print-spec"), "not with --print-spec"),
        ((*pairs, "--alphas", "1.2", "--as-adapter"), "not with --as-adapter"),
        ((*pairs, "--alphas", "a,b"), "--alphas a,b: give first:last:step"),
        (("merge", spec, tmp_path / "out", "--interpolate"), "goes with --alphas"),
    ):
        ran = expo(*words)
        assert ran.code == 2, words
        assert why in ran.err
    with pytest.raises(SpecError, match="a second document"):
        door.merge(two, tmp_path / "out", alphas=[1.2])
    assert not named(tmp_path)


@pytest.mark.parametrize(
    ("out", "alpha", "name"),
    [("a/b", 1.2, "b-alpha-1.2"), ("b.v2", 2.0, "b.v2-alpha-2"), ("b", -0.5, "b-alpha--0.5")],
)
def test_names(out: str, alpha: float, name: str) -> None:
    assert place_at(Path(out), alpha) == Path(out).with_name(name)


def test_the_place_of_this_directory_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_at(Path(), 1.5) == tmp_path.with_name(f"{tmp_path.name}-alpha-1.5")


def test_each_is_verified(tmp_path: Path, expo: Expo) -> None:
    for name, seed in (("sft", 0), ("aligned", 1)):
        write_checkpoint(tmp_path / name, weights(seed), config={"model_type": "no-such-model"})
    ran = expo(
        "extrapolate", tmp_path / "sft", tmp_path / "aligned", tmp_path / "out",
        "--alphas", "1.2,1.5", "--json", verify=True,
    )  # fmt: skip
    results = json.loads(ran.out)
    assert all(result["checks"] for result in results)
    assert ran.code == (0 if all(result["verified"] for result in results) else 3)
