"""Merge methods: operators against float64, whole merges against mergekit's own arithmetic."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import expo as door
from expo.compute.plain import Plain
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, SpecError
from expo.operators.merging import add_task_vectors
from expo.operators.methods import Block, mean, nuslerp_coefficients, slerp_coefficients
from expo.operators.sparsify import (
    magnitude_mask,
    norm_ratio,
    outlier_mask,
    random_mask,
    ranked_mask,
)
from expo.planning.build import build_plan
from expo.spec.read import read_spec
from expo.verbs import merge as merge_verb

from .conftest import write_checkpoint

Spec = dict[str, object]

GRADIENT = [0.2, 1.0, 0.6]
FILTERS = [
    {"filter": "self_attn", "value": [0.1, 0.9]},
    {"filter": "mlp", "value": 0.7},
    {"value": 0.4},
]

SPECS: dict[str, Spec] = {
    "linear": {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.9}}]},
    "linear, not normalized": {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.9}}], "parameters": {"normalize": False}},
    "linear, three models, gradient": {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("base", 1.0), ("a", GRADIENT), ("b", FILTERS))]},
    "ExPO as linear": {"merge_method": "linear", "models": [{"model": "base", "parameters": {"weight": -0.5}}, {"model": "a", "parameters": {"weight": 1.5}}]},
    "ExPO as task arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 1.5}}]},
    "task arithmetic, base listed": {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "base"}, {"model": "a", "parameters": {"weight": 0.6}}, {"model": "b", "parameters": {"weight": FILTERS}}], "parameters": {"lambda": 1.3, "normalize": True}},
    "ties": {"merge_method": "ties", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 0.6, "density": 0.4}}, {"model": "b", "parameters": {"weight": 0.5, "density": GRADIENT}}], "parameters": {"int8_mask": True}},
    "ties, not normalized": {"merge_method": "ties", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 0.6}}, {"model": "b", "parameters": {"weight": -0.5, "density": 0.2}}], "parameters": {"normalize": False, "rescale": True}},
    "breadcrumbs": {"merge_method": "breadcrumbs", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 0.6, "density": 0.5, "gamma": 0.05}}, {"model": "b", "parameters": {"weight": 0.5, "density": 0.99}}]},
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 0.6, "density": 0.5}}, {"model": "b", "parameters": {"weight": 0.5, "density": 0.3}}]},
    "slerp": {"merge_method": "slerp", "base_model": "a", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}], "parameters": {"t": FILTERS}},
    "slerp of models": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "b"}], "parameters": {"t": 0.35}},
    "nuslerp": {"merge_method": "nuslerp", "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.7}}]},
    "nuslerp of task vectors": {"merge_method": "nuslerp", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.7}}]},
    "nuslerp, last axis": {"merge_method": "nuslerp", "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.7}}], "parameters": {"nuslerp_flatten": False}},
    "nuslerp, first axis": {"merge_method": "nuslerp", "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.7}}], "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
    "passthrough": {"merge_method": "passthrough", "models": [{"model": "a", "parameters": {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}}]},
    "slices": {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1], "parameters": {"weight": 0.2}}, {"model": "b", "layer_range": [0, 1], "parameters": {"weight": 0.8}}]}, {"sources": [{"model": "a", "layer_range": [1, 2]}, {"model": "b", "layer_range": [1, 2]}], "parameters": {"weight": 1.0}}], "parameters": {"weight": 0.5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three float32 models around the demo's: no two deltas are of one magnitude."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("base", "a", "b")):
        shutil.copytree(MODELS / "aligned", root / name)
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(MODELS / "aligned" / "model.safetensors")
        moved = {
            key: t.float() + number * 0.01 * torch.randn(t.shape, generator=generator)
            for key, t in tensors.items()
        }
        save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
    return root


def run(spec: Spec, root: Path, out: Path) -> dict[str, torch.Tensor]:
    absolute = json.loads(json.dumps(spec))
    for key in ("base_model", "onto", "donor"):
        if key in absolute:
            absolute[key] = str(root / absolute[key])
    sources = absolute.get("models") or [s for one in absolute["slices"] for s in one["sources"]]
    for source in sources:
        source["model"] = str(root / source["model"])
    result = door.merge(absolute, out, verify=False)
    assert result.out == out
    return load_file(out / "model.safetensors")


def with_mergekit(spec: Spec, root: Path, out: Path) -> dict[str, torch.Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = yaml.safe_dump(spec)
    for name in ("base", "a", "b"):
        text = text.replace(f"model: {name}\n", f"model: {root / name}\n")
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))
    found: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    return found


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many bfloat16 values lie between two tensors, at most."""

    def order(t: torch.Tensor) -> torch.Tensor:
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((order(a) - order(b)).abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPECS)
def test_a_spec_of_mergekit_gives_mergekits_weights(
    name: str, models: Path, tmp_path: Path
) -> None:
    spec = SPECS[name] | {"dtype": "float32", "out_dtype": "bfloat16"}
    mine = run(spec, models, tmp_path / "expo")
    theirs = with_mergekit(spec, models, tmp_path / "mergekit")
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        apart = (tensor.float() - theirs[key].float()).abs().max()
        # float32 sums in another order: an element that nearly cancels may be more ULPs of its own
        # small size away, but no more than float32 noise of the tensor's largest.
        assert ulps(tensor, theirs[key]) <= 1 or apart < 1e-6 * tensor.abs().max(), key


RANDOM = {
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "della": {"density": 0.4, "epsilon": 0.2},
    "della_linear": {"density": 0.4, "epsilon": 0.2},
}


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_keep_what_they_should(method: str, models: Path, tmp_path: Path) -> None:
    """One model at weight 1: the kept deltas are the model's own, rescaled to their L1 norm."""
    spec: Spec = {
        "merge_method": method, "base_model": "base", "out_dtype": "float32", "seed": 3,
        "models": [{"model": "a", "parameters": {"weight": 1.0} | RANDOM[method]}],
    }  # fmt: skip
    mine = run(spec, models, tmp_path / "one")
    base, top = (load_file(models / name / "model.safetensors") for name in ("base", "a"))
    name = "model.embed_tokens.weight"
    delta, got = (top[name] - base[name]).double(), (mine[name] - base[name]).double()
    kept = got.abs() > 1e-7
    density = RANDOM[method]["density"]
    assert abs(float(kept.double().mean()) - density) < 4 * math.sqrt(density / delta.numel())
    assert float(got.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
    ratio = got[kept] / delta[kept]
    assert float(ratio.std() / ratio.mean()) < 1e-2
    if method.startswith("della"):  # larger ones stay more often
        middle = delta.abs().median(dim=1, keepdim=True).values
        large = delta.abs() > middle
        assert float(kept[large].double().mean()) > float(kept[~large].double().mean()) + 0.1
    again = run(spec, models, tmp_path / "two")
    assert all(torch.equal(mine[key], again[key]) for key in mine)
    other = run(spec | {"seed": 4}, models, tmp_path / "three")
    assert not torch.equal(mine[name], other[name])


EXPO: dict[str, Spec] = {
    "two models": {"models": [{"model": "a", "parameters": {"alpha": 1.3}}, {"model": "b", "parameters": {"paper_alpha": -0.6}}], "interpolate": True},
    "onto": {"models": [{"model": "a", "parameters": {"alpha": 1.3}}], "onto": "b", "donor": "b"},
    "gradient": {"models": [{"model": "a", "parameters": {"alpha": [1.0, 2.0]}}]},
    "filters": {"models": [{"model": "a", "parameters": {"alpha": [{"filter": "mlp", "value": 1.2}, {"value": [1.5, 3.0]}]}}]},
    "excluded": {"models": [{"model": "a", "parameters": {"alpha": 2.0}}], "exclude": ["embeddings", "head", "norms"]},
    "fixed layers": {"models": [{"model": "a", "parameters": {"alpha": 2.0}}], "fix_first_layers": 1},
    "magnitude": {"models": [{"model": "a", "parameters": {"alpha": 1.5}}], "transforms": [{"magnitude": {"density": 0.3}}]},
    "dare": {"models": [{"model": "a", "parameters": {"alpha": 1.5}}], "transforms": [{"dare": {"density": 0.5}}]},
    "ties": {"models": [{"model": "a", "parameters": {"alpha": 1.5}}, {"model": "b", "parameters": {"alpha": 1.2}}], "transforms": [{"ties": {"density": 0.5}}]},
}  # fmt: skip


def reference(name: str, spec: Spec, key: str, root: Path) -> torch.Tensor:
    """The formula in float64, by hand for each case."""
    base, a, b = (
        load_file(root / m / "model.safetensors")[key].double() for m in ("base", "a", "b")
    )
    layer = int(key.split(".")[2]) if "layers" in key else None
    match name:
        case "two models":
            return base + 1.3 * (a - base) + 0.4 * (b - base)
        case "onto":
            return b + 1.3 * (a - base)
        case "gradient":
            return base + (1.0 + (layer or 0)) * (a - base)
        case "filters":
            alpha = 1.2 if "mlp" in key else 1.5 + 1.5 * (layer or 0)
            return base + alpha * (a - base)
        case "excluded":
            return a if layer is None or "norm" in key else base + 2.0 * (a - base)
        case "fixed layers":
            return a if layer == 0 else base + 2.0 * (a - base)
        case "magnitude":
            delta = (a.float() - base.float()).double()
            cut = (
                delta.abs()
                .flatten()
                .sort(descending=True)
                .values[max(1, int(0.3 * delta.numel())) - 1]
            )
            return base + 1.5 * delta * (delta.abs() >= cut)
        case "ties":
            deltas = []
            for top, alpha in ((a, 1.5), (b, 1.2)):
                delta = (top.float() - base.float()).double()
                cut = (
                    delta.abs()
                    .flatten()
                    .sort(descending=True)
                    .values[max(1, int(0.5 * delta.numel())) - 1]
                )
                deltas.append(alpha * delta * (delta.abs() >= cut))
            positive = deltas[0] + deltas[1] >= 0
            return base + sum(d * ((d > 0) == positive) for d in deltas)
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize("name", [name for name in EXPO if name != "dare"])
def test_the_algebra_of_expo_against_float64(name: str, models: Path, tmp_path: Path) -> None:
    spec = {"merge_method": "expo", "base_model": "base", "out_dtype": "float32"} | EXPO[name]
    for key, tensor in run(spec, models, tmp_path / "out").items():
        expected = reference(name, spec, key, models)
        scale = float(expected.abs().max()) + 1e-3
        assert float((tensor.double() - expected).abs().max()) < 1e-6 * scale, key


@pytest.mark.parametrize("name", ["two models", "dare", "ties"])
def test_the_bytes_do_not_depend_on_threads_or_chunks(
    name: str, models: Path, tmp_path: Path
) -> None:
    from expo.compute.stream import Tuning

    from .conftest import run_plan

    spec = {
        "merge_method": "expo",
        "base_model": "base",
        "rounding": "stochastic",
        "seed": 5,
    } | EXPO[name]
    absolute = json.loads(json.dumps(spec).replace('": "base"', f'": "{models}/base"'))
    for model in absolute["models"]:
        model["model"] = str(models / model["model"])
    outputs = []
    for number, (threads, chunk) in enumerate(((1, 8 << 20), (4, 4096), (2, 1 << 15))):
        tuning = Tuning(threads=threads, chunk_bytes=chunk, block_elements=1024)
        run_plan(build_plan(read_spec(absolute)), tmp_path / f"o{number}", tuning=tuning)
        outputs.append((tmp_path / f"o{number}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_tensor_larger_than_any_buffer_is_prepared_whole(tmp_path: Path) -> None:
    from expo.compute.stream import Tuning

    from .conftest import run_plan

    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a"):
        tensors = {"w.weight": torch.randn(1200, 1100, generator=generator, dtype=torch.float64)}
        write_checkpoint(tmp_path / name, tensors)
    spec = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "out_dtype": "float32",
            "models": [{"model": str(tmp_path / "a"), "parameters": {"weight": 1, "density": 0.25}}]}  # fmt: skip
    for number, chunk in enumerate((4096, 8 << 20)):
        tuning = Tuning(threads=2, chunk_bytes=chunk)
        run_plan(build_plan(read_spec(spec)), tmp_path / f"o{number}", tuning=tuning)
    one, two = (load_file(tmp_path / f"o{n}" / "model.safetensors")["w.weight"] for n in (0, 1))
    assert torch.equal(one, two)
    base, top = (load_file(tmp_path / n / "model.safetensors")["w.weight"] for n in ("base", "a"))
    delta = top - base
    cut = delta.abs().flatten().kthvalue(delta.numel() * 3 // 4).values
    expected = base + delta * (delta.abs() > cut)
    assert float((one - expected).abs().max()) < 1e-6


def test_alpha_is_reported_as_it_is_asked_for(models: Path, tmp_path: Path) -> None:
    spec = {"merge_method": "expo", "base_model": str(models / "base"), "out_dtype": "float32",
            "models": [{"model": str(models / "a"), "parameters": {"alpha": [1.0, 2.0]}}]}  # fmt: skip
    result = door.merge(spec, tmp_path / "out", verify=False)
    assert result.alpha is None
    assert result.statistics.alpha is not None
    assert 1.0 < result.statistics.alpha < 2.0
    assert result.statistics.effective_alpha == pytest.approx(result.statistics.alpha, abs=1e-5)
    report = door.plan(spec)
    assert report.alpha_range == (1.0, 2.0)
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    assert manifest["spec"]["models"][0]["parameters"] == {"alpha": [1.0, 2.0]}
    assert manifest["alpha"] is None


def test_linear_against_float64() -> None:
    tensors = [torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = sum(w * t.double() for w, t in zip((0.2, 0.5, 0.9), tensors, strict=True)) / 1.6
    thetas = [tensor.numpy() for tensor in tensors]
    values = [{"weight": weight} for weight in (0.2, 0.5, 0.9)]
    block = Block(thetas, None, thetas[0], values, {"normalize": True})
    got = torch.from_numpy(mean(Plain(), block))
    assert float((got - expected).abs().max()) < 1e-6


def test_slerp_stays_on_the_sphere() -> None:
    a, b = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    a, b = a / a.norm(), b / b.norm()
    for t in (0.0, 0.3, 1.0):
        one, two = slerp_coefficients(1.0, 1.0, float(a @ b), t)
        assert float((one * a + two * b).norm()) == pytest.approx(1.0, abs=1e-12)
    assert slerp_coefficients(1.0, 1.0, 0.9999, 0.25) == (0.75, 0.25)
    squares = (float(x @ y) for x, y in ((a, a), (b, b), (a, b)))
    one, two = nuslerp_coefficients(*(np.array(square) for square in squares), 0.3)
    assert float((float(one) * a + float(two) * b).norm()) == pytest.approx(1.0, abs=1e-12)


def test_masks_keep_the_right_elements() -> None:
    delta = torch.tensor([3.0, -1.0, 0.5, -2.0, 0.1, 4.0])
    assert magnitude_mask(delta, 0.5).tolist() == [True, False, False, True, False, True]
    assert magnitude_mask(delta, 0.01).sum() == 1
    assert magnitude_mask(delta, 0).sum() == 0
    assert outlier_mask(delta, 0.5, 0.17).tolist() == [True, True, False, True, False, False]
    equal = torch.ones(8)
    assert magnitude_mask(equal, 0.5).tolist() == [True] * 4 + [False] * 4
    draws = torch.tensor(np.random.default_rng(0).random(100_000))
    assert float(random_mask(draws, 0.3).double().mean()) == pytest.approx(0.3, abs=0.01)
    rows = torch.arange(100_000.0).reshape(100, 1000)
    ranked = ranked_mask(rows, draws.reshape(rows.shape), 0.5, 0.2).double().mean(dim=0)
    assert float(ranked[:100].mean()) == pytest.approx(0.32, abs=0.03)
    assert float(ranked[-100:].mean()) == pytest.approx(0.68, abs=0.03)
    assert norm_ratio(delta, magnitude_mask(delta, 0.5)) == pytest.approx(10.6 / 9.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_is_the_exact_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(5000, generator=generator, dtype=dtype) ** 5  # over many binades
    delta[::7] = 0.0
    delta[::11] = 0.25
    ordered = delta.abs().sort(descending=True).values
    for density in (0.001, 0.1, 0.37, 0.5, 0.9, 0.999):
        mask = magnitude_mask(delta, density)
        kept = max(1, int(density * 5000))
        assert int(mask.sum()) == kept
        assert torch.equal(delta[mask].abs().sort(descending=True).values, ordered[:kept])


def test_signs_are_elected() -> None:
    deltas = [torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([2.0, 3.0, -1.0, 0.0])]
    got = add_task_vectors(torch.zeros(4), deltas, (1.0, 1.0), elect_sign=True, normalize=True)
    assert got.tolist() == [1.5, 3.0, 2.0, 0.0]


def test_nan_in_one_of_several_models_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "b", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    for method in ("linear", "slerp"):
        spec: Spec = {"merge_method": method, "models": [
            {"model": str(models / "a"), "parameters": {"weight": 1}}, {"model": str(tmp_path / "b"), "parameters": {"weight": 1}}]}  # fmt: skip
        if method == "slerp":
            spec = {"merge_method": method, "base_model": str(models / "a"),
                    "models": [{"model": str(tmp_path / "b")}], "parameters": {"t": 0.5}}  # fmt: skip
        with pytest.raises(
            CheckpointError, match=r"model\.norm\.weight holds NaN or Inf in one of"
        ):
            door.merge(spec, tmp_path / "out", verify=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "donor", "same"),
    [
        ({"models": [{"model": "a", "parameters": {"alpha": 1.7}}, {"model": "b", "parameters": {"alpha": 1.4}}], "exclude": ["norms", "head"]}, "a", "norm"),
        ({"models": [{"model": "a", "parameters": {"alpha": 1.7}}], "onto": "b", "donor": "b", "exclude": ["norms"]}, "b", "norm"),
        ({"models": [{"model": "a", "parameters": {"alpha": 1.7}}], "transforms": [{"magnitude": {"density": 0.5}}], "fix_first_layers": 1}, "a", "layers.0."),
        ({"models": [{"model": "a", "parameters": {"alpha": 1.7}}], "transforms": [{"dare": {"density": 0.5}}], "fix_last_layers": 1}, "a", "layers.1."),
    ],
    ids=["several models", "onto", "transform", "random transform"],
)  # fmt: skip
def test_what_is_left_alone_is_the_donors(
    more: Spec, donor: str, same: str, models: Path, tmp_path: Path
) -> None:
    out = run({"merge_method": "expo", "base_model": "base", **more}, models, tmp_path / "out")
    tensors = load_file(models / donor / "model.safetensors")
    stayed = {name for name in tensors if same in name}
    assert stayed
    assert all(torch.equal(out[name], tensors[name]) for name in stayed)
    assert not any(torch.equal(out[n], tensors[n]) for n in tensors if "q_proj" in n and n not in stayed)  # fmt: skip


STAGES = """\
name: halfway
merge_method: linear
models:
  - {model: base, parameters: {weight: 0.5}}
  - {model: a, parameters: {weight: 0.5}}
out_dtype: float32
---
merge_method: expo
base_model: halfway
models:
  - model: b
    parameters: {alpha: 1.5}
out_dtype: float32
"""


def test_several_documents_run_in_order(models: Path, tmp_path: Path, expo, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "spec.yml").write_text(STAGES)
    ran = expo("merge", "spec.yml", "out", "-q")
    assert ran.code == 0, ran.err
    base, a, b, out = (
        load_file(tmp_path / n / "model.safetensors") for n in ("base", "a", "b", "out")
    )
    for key, tensor in out.items():
        middle = (base[key].double() + a[key].double()) / 2
        expected = middle + 1.5 * (b[key].double() - middle)
        assert float((tensor.double() - expected).abs().max()) < 1e-6
    assert not list(tmp_path.glob(".*"))  # what came before is gone
    assert door.merge(tmp_path / "spec.yml", tmp_path / "again", verify=False).out.name == "again"
    assert expo("plan", "spec.yml").code == 0
    (tmp_path / "spec.yml").write_text(STAGES.replace("name: halfway\n", ""))
    unnamed = expo("merge", "spec.yml", "out2")
    assert unnamed.code == 2
    assert "only one document goes without a name:, the one for OUT" in unnamed.err


def test_a_later_document_that_would_be_refused_stops_all_before_the_first(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(models / name)
    later = STAGES.replace(
        "parameters: {alpha: 1.5}", "parameters: {alpha: {filter: mlp, value: 1.5}}"
    )
    (tmp_path / "spec.yml").write_text(later)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a document ran")

    monkeypatch.setattr(merge_verb, "run_plans", never)
    with pytest.raises(CheckpointError, match="no alpha for"):
        door.merge(tmp_path / "spec.yml", tmp_path / "out", verify=False)
    assert not list(tmp_path.glob(".*"))


BAD_SPECS = {
    "no weight": ({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 1}}]}, "models.0: needs weight: linear has no default for it"),
    "a filter that fits none": ({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": {"filter": "mlp", "value": 1}}}]}, "no weight of a for"),
    "epsilon": ({"merge_method": "della", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 1, "density": 0.1, "epsilon": 0.3}}]}, "density 0.1 ± epsilon 0.3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SPECS)
def test_numbers_that_do_not_suffice_are_refused(name: str, models: Path, tmp_path: Path) -> None:
    spec, message = BAD_SPECS[name]
    with pytest.raises((CheckpointError, SpecError), match=message):
        run(spec, models, tmp_path / "out")
