"""The Python door: the same choices as the command line, the same refusals, typed results."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import expo as door
from expo.spec.read import read_spec
from expo.spec.resolved import resolved

from .conftest import Pair, Ran, extrapolate, nudged, weights, write_checkpoint
from .test_merge import digest

CHAIN = """\
merge_method: task_arithmetic
base_model: half
models: [{model: b, parameters: {weight: 0.5}}]
---
name: half
merge_method: linear
models: [{model: base, parameters: {weight: 0.5}}, {model: a, parameters: {weight: 0.5}}]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models `base`, `a` and `b`, and a spec of two documents, in the working directory."""
    for number, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, nudged(weights(), seed=number) if number else weights())
    monkeypatch.chdir(tmp_path)
    Path("spec.yml").write_text(CHAIN)
    return tmp_path


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(door.__file__).parent / "py.typed").is_file()


def test_extrapolate_has_the_choices_of_the_command_line(pair: Pair, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    result = extrapolate(
        pair.sft,
        pair.aligned,
        out,
        paper_alpha=0.3,
        max_shard_bytes=500,
        progress=lambda *done: seen.append(done),
    )
    assert (result.alpha, result.paper_alpha) == (1.3, 0.3)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert {total for _, total in seen} == {result.written_bytes}
    with pytest.raises(door.OutputError, match="or add --overwrite"):
        extrapolate(pair.sft, pair.aligned, out, alpha=1.3)
    again = extrapolate(pair.sft, pair.aligned, out, alpha=1.3, overwrite=True)
    assert len(list(again.out.glob("model-*.safetensors"))) == 3
    with pytest.raises(door.SpecError, match="bytes above 0, not 0"):
        extrapolate(pair.sft, pair.aligned, tmp_path / "o", alpha=1.3, max_shard_bytes=0)
    with pytest.raises(door.SpecError, match="give alpha or paper alpha, not both"):
        extrapolate(pair.sft, pair.aligned, tmp_path / "o", alpha=1.3, paper_alpha=0.3)
    with pytest.raises(door.SpecError, match="neither has a default"):
        extrapolate(pair.sft, pair.aligned, tmp_path / "o")


def test_an_alpha_between_is_refused_unless_it_is_meant(pair: Pair, tmp_path: Path) -> None:
    sides, out = (pair.sft, pair.aligned), tmp_path / "out"
    tensors = (pair.sft_tensors, pair.aligned_tensors)
    message = r"cards that say 0\.3 mean --paper-alpha 0\.3 .*interpolate=True in Python"
    for call in (
        lambda: extrapolate(*sides, out, alpha=0.3),
        lambda: door.plan(*sides, alpha=0.3),
        lambda: list(door.apply(*tensors, alpha=0.3)),
        lambda: door.extract_lora(pair.aligned, out, minus=pair.sft, rank=2, alpha=0.3),
    ):
        with pytest.raises(door.SpecError, match=message):
            call()
    with pytest.raises(door.SpecError, match=r"paper alpha -0\.3 is alpha 0\.7: a point between"):
        extrapolate(*sides, out, paper_alpha=-0.3)
    assert extrapolate(*sides, out, alpha=0.3, interpolate=True).alpha == 0.3
    assert door.plan(*sides, alpha=0.3, interpolate=True).alpha == 0.3
    assert dict(door.apply(*tensors, alpha=0.3, interpolate=True))
    lora = door.extract_lora(
        pair.aligned, tmp_path / "lora", minus=pair.sft, rank=2, alpha=0.3, interpolate=True
    )
    assert lora.scale == 0.3


def test_plan_takes_two_models(pair: Pair, expo: Callable[..., Ran]) -> None:
    report = door.plan(pair.sft, pair.aligned, paper_alpha=0.5)
    assert (report.ok, report.alpha) == (True, 1.5)
    assert door.plan(str(pair.sft), pair.aligned).alpha is None
    shown = json.loads(expo("plan", pair.sft, pair.aligned, "--alpha", 1.5, "--json").out)
    free = {"free_disk_bytes": 0}
    assert shown | free == json.loads(json.dumps(asdict(report))) | free
    with pytest.raises(door.SpecError, match="alpha belongs into the spec here"):
        door.plan("spec.yml", alpha=1.5)
    with pytest.raises(door.SpecError, match="a spec alone, or two models"):
        door.plan({"merge_method": "expo"}, pair.aligned)


def test_plan_of_several_documents(place: Path) -> None:
    report = door.plan("spec.yml")
    assert report.ok
    assert report.method == "task_arithmetic"
    assert report.sources["base"].model == "half"
    assert [plan.method for plan in report.earlier] == ["linear"]
    assert report.earlier[0].write_bytes == report.write_bytes
    write_checkpoint(place / "a", {"model.norm.weight": weights()["model.norm.weight"]})
    refused = door.plan("spec.yml")  # the first one already
    assert not refused.ok
    assert (refused.method, refused.earlier) == ("linear", ())


def test_the_resolved_form_of_several_documents(place: Path, expo: Callable[..., Ran]) -> None:
    shown = expo("plan", "spec.yml", "--resolved")
    assert shown.code == 0, shown.err
    first, last = yaml.safe_load_all(shown.out)
    assert (first["name"], first["models"][0]["model"]) == ("half", "base")
    assert first["parameters"] == {"normalize": True}
    assert last["base_model"] == "half"
    assert "name" not in last
    assert json.loads(expo("plan", "spec.yml", "--resolved", "--json").out) == [first, last]
    Path("again.yml").write_text(shown.out)
    assert expo("plan", "again.yml", "--resolved").out == shown.out
    for spec, out in (("spec.yml", "one"), ("again.yml", "two")):
        assert expo("merge", spec, out).code == 0
    files = [{n: h for n, h in digest(Path(out)).items() if n != "expo.json"} for out in ("one", "two")]  # fmt: skip
    assert files[0] == files[1]


def test_documents_through_mergekit_resolve_too(place: Path, expo: Callable[..., Ran]) -> None:
    """By the names that they have for each other, with adapters, seeds and verification."""
    Path("spec.yml").write_text(
        """\
name: tall
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 2]}]
seed: 5
verify: {stop_at: warning}
---
merge_method: linear
models: [{model: tall, parameters: {weight: 1}}]
"""
    )
    first, last = yaml.safe_load_all(expo("plan", "spec.yml", "--resolved").out)
    assert (first["seed"], first["verify"]) == (5, {"stop_at": "warning"})
    assert last["models"][0]["model"] == "tall"


def test_an_alpha_between_survives_its_resolved_form(pair: Pair) -> None:
    spec = {
        "merge_method": "expo",
        "base_model": str(pair.sft),
        "models": [{"model": str(pair.aligned)}],
        "parameters": {"alpha": 0.3},
        "interpolate": True,
    }
    request = read_spec(spec)
    assert read_spec(resolved(request)) == request


def test_dtypes_have_their_short_names_everywhere(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    assert extrapolate(pair.sft, pair.aligned, tmp_path / "o", alpha=2, dtype="fp32").written_bytes
    sides = {"minus": pair.sft, "rank": 1}
    short = door.extract_lora(pair.aligned, tmp_path / "short", **sides, dtype="bf16")
    long = door.extract_lora(pair.aligned, tmp_path / "long", **sides, dtype="bfloat16")
    assert short.written_bytes == long.written_bytes
    flags = ("--minus", pair.sft, "--rank", 1, "--dtype", "torch.float16", "-q")
    assert expo("extract-lora", pair.aligned, tmp_path / "flag", *flags).code == 0
    with pytest.raises(door.SpecError, match="dtype int8 is not one of float32, bfloat16, float16"):
        door.extract_lora(pair.aligned, tmp_path / "bad", **sides, dtype="int8")
