"""Specs that only mergekit's engine can run, into expo's kind of output."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import expo as door
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, SpecError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for side in ("sft", "aligned"):
        shutil.copytree(MODELS / side, tmp_path / side)
        (tmp_path / side / "LICENSE").write_text("Apache-2.0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


STACKED = """\
merge_method: passthrough
slices:
  - sources: [{model: sft, layer_range: [0, 2]}]
  - sources: [{model: aligned, layer_range: [1, 2]}]
dtype: bfloat16
"""
KARCHER = """\
merge_method: karcher
models: [{model: sft}, {model: aligned}]
dtype: float32
out_dtype: bfloat16
"""
UNION = """\
merge_method: linear
models:
  - {model: sft, parameters: {weight: 0.5}}
  - {model: aligned, parameters: {weight: 0.5}}
tokenizer_source: union
dtype: bfloat16
"""


@pytest.mark.parametrize(
    ("text", "reason", "layers"),
    [
        (STACKED, "layers 1 to 2 follow 2: reordered or stacked layers", 3),
        pytest.param(KARCHER, "karcher does not stream through expo", 2, marks=pytest.mark.slow),
        (UNION, "a new vocabulary needs mergekit's tokenizer surgery", 2),
    ],
    ids=["stacked", "karcher", "union"],
)
def test_what_needs_mergekit_runs_through_it(
    workplace: Path, expo, text: str, reason: str, layers: int
) -> None:
    (workplace / "spec.yml").write_text(text)
    planned = expo("plan", "spec.yml")
    assert planned.code == 0, planned.err
    assert f"runs through the mergekit library: {reason}" in planned.out
    ran = expo("merge", "spec.yml", "out", verify=True)
    assert ran.code == 0, ran.err
    out = workplace / "out"
    manifest = json.loads((out / "expo.json").read_text())
    assert manifest["engine"] == "mergekit"
    assert reason in manifest["reasons"]
    assert manifest["verified"] is True
    assert str(workplace) not in json.dumps(manifest)
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert f"model.layers.{layers - 1}.mlp.up_proj.weight" in names
    assert (out / "LICENSE").read_text() == "Apache-2.0"  # mergekit loses it
    assert (out / "generation_config.json").exists()
    assert {path.name for path in workplace.iterdir()} == {"sft", "aligned", "spec.yml", "out"}
    assert all(path.stat().st_mode & 0o044 for path in out.iterdir())
    assert yaml.safe_load(json.dumps(manifest["spec"]))["merge_method"] in text


def test_a_second_run_says_that_out_is_taken(workplace: Path, expo) -> None:
    (workplace / "spec.yml").write_text(KARCHER)
    assert expo("merge", "spec.yml", "out").code == 0
    again = expo("merge", "spec.yml", "out")
    assert again.code == 1
    assert "exists and is not empty" in again.err
    assert expo("merge", "spec.yml", "out", "--overwrite").code == 0


def test_without_the_library_the_error_names_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def missing(name: str, *more: object):
        if name.startswith("mergekit"):
            raise ImportError(name)
        return load(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SpecError, match=r"pip install 'expo-merge\[mergekit\]'"):
        door.merge(yaml.safe_load(KARCHER), workplace / "out", verify=False)
    assert {path.name for path in workplace.iterdir()} == {"sft", "aligned"}


def test_what_mergekit_refuses_leaves_nothing(workplace: Path) -> None:
    spec = yaml.safe_load(UNION) | {"chat_template": "no template"}
    with pytest.raises((CheckpointError, SpecError), match="mergekit"):
        door.merge(spec, workplace / "out", verify=False)
    assert {path.name for path in workplace.iterdir()} == {"sft", "aligned"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (KARCHER + "rounding: stochastic\n", "rounding: does not go with mergekit's engine"),
        (UNION.replace("linear", "expo"), "expo does not go with it"),
    ],
)
def test_what_does_not_go_with_it(workplace: Path, text: str, message: str) -> None:
    (workplace / "spec.yml").write_text(text)
    with pytest.raises(SpecError) as caught:
        door.plan("spec.yml")
    assert message in str(caught.value)


SHORT = """\
merge_method: linear
slices:
  - sources:
      - {model: sft, layer_range: [0, 1], parameters: {weight: 0.5}}
      - {model: aligned, layer_range: [0, 1], parameters: {weight: 0.5}}
dtype: bfloat16
"""
MODULES = """\
merge_method: passthrough
modules:
  default:
    slices:
      - sources: [{model: PLACE/./sft/, layer_range: [1, 2]}]
      - sources: [{model: PLACE/./aligned/, layer_range: [0, 2]}]
dtype: bfloat16
"""
STAGES = """\
name: halfway
merge_method: linear
models: [{model: sft, parameters: {weight: 0.5}}, {model: aligned, parameters: {weight: 0.5}}]
dtype: bfloat16
---
merge_method: passthrough
slices:
  - sources: [{model: halfway, layer_range: [0, 2]}]
  - sources: [{model: aligned, layer_range: [1, 2]}]
dtype: bfloat16
"""


def layers(out: Path) -> set[str]:
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    return {name.split(".")[2] for name in names if ".layers." in name}


@pytest.mark.slow
def test_slices_that_end_before_the_model_does(workplace: Path, expo) -> None:
    (workplace / "spec.yml").write_text(SHORT)
    planned = expo("plan", "spec.yml")
    assert "slices end at layer 1, sft has 2" in planned.out
    assert expo("merge", "spec.yml", "out", verify=True).code == 0
    assert layers(workplace / "out") == {"0"}
    assert json.loads((workplace / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    (workplace / "spec.yml").write_text(SHORT + "rounding: stochastic\n")
    refused = expo("plan", "spec.yml")
    assert refused.code == 2
    assert "slices end at layer 1, sft has 2: that needs mergekit's engine" in refused.err


@pytest.mark.slow
def test_models_anywhere_in_a_spec_are_found_and_no_path_leaks(workplace: Path, expo) -> None:
    (workplace / "spec.yml").write_text(MODULES.replace("PLACE", str(workplace)))
    ran = expo("merge", "spec.yml", "out", verify=True)
    assert ran.code == 0, ran.err
    out = workplace / "out"
    assert layers(out) == {"0", "1", "2"}
    manifest = json.loads((out / "expo.json").read_text())
    assert manifest["donor"]
    for path in out.iterdir():
        assert str(workplace).encode() not in path.read_bytes(), path.name
        assert path.name in (*manifest["files"], *manifest["beside"], "expo.json")


@pytest.mark.slow
def test_a_stage_is_a_model_of_a_spec_for_mergekit(workplace: Path, expo) -> None:
    (workplace / "spec.yml").write_text(STAGES)
    ran = expo("merge", "spec.yml", "out", verify=True)
    assert ran.code == 0, ran.err
    assert layers(workplace / "out") == {"0", "1", "2"}
    assert {path.name for path in workplace.iterdir()} == {"sft", "aligned", "spec.yml", "out"}


@pytest.mark.parametrize(
    "flag", [("--dtype", "float32"), ("--rounding", "stochastic"), ("--allow-missing", "lm_head*")]
)
def test_flags_of_our_engine_are_refused_with_the_other(
    workplace: Path, expo, flag: tuple[str, str]
) -> None:
    (workplace / "spec.yml").write_text(KARCHER)
    ran = expo("merge", "spec.yml", "out", *flag)
    assert ran.code == 2
    assert (
        f"{flag[0]}: not with mergekit's engine (karcher does not stream through expo)" in ran.err
    )
    assert not (workplace / "out").exists()


@pytest.mark.slow
def test_the_output_says_what_is_known_of_it(workplace: Path, expo) -> None:
    (workplace / "spec.yml").write_text(UNION)
    assert "tokenizer  from mergekit, as the spec asks" in expo("plan", "spec.yml").out
    assert expo("merge", "spec.yml", "out", "--max-shard-size", "20KB", verify=True).code == 0
    out = workplace / "out"
    manifest = json.loads((out / "expo.json").read_text())
    assert manifest["donor"] is None
    assert manifest["dtypes"] == ["BF16"]
    assert len(list(out.glob("*.safetensors"))) > 1
    assert "byte for byte" not in (out / "README.md").read_text()


MIXTURE = """\
base_model: sft
gate_mode: random
dtype: bfloat16
experts_per_token: 1
experts:
  - {source_model: sft, positive_prompts: [how many]}
  - {source_model: aligned, positive_prompts: [why]}
"""


@pytest.mark.slow
def test_a_mixture_of_experts_becomes_a_verified_output(workplace: Path, expo) -> None:
    (workplace / "spec.yml").write_text(MIXTURE)
    planned = expo("plan", "spec.yml")
    assert planned.code == 0, planned.err
    assert "a mixture of experts is made by mergekit-moe" in planned.out
    ran = expo("merge", "spec.yml", "out", verify=True)
    assert ran.code == 0, ran.err
    out = workplace / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 2)
    manifest = json.loads((out / "expo.json").read_text())
    assert (manifest["verified"], manifest["method"]) == (True, "moe")
    tokenizer = "tokenizer.json"  # mergekit-moe saves it anew
    assert (out / tokenizer).read_bytes() == (MODELS / "sft" / tokenizer).read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("experts_per_token: 1", "experts_per_token: 3", "is from 1 to the 2 experts that there are, not 3"),
        ("random", "hidden", ""),
        ("random", "cheap", "gate_mode: 'cheap' is not one of hidden, cheap_embed"),
        (", positive_prompts: [why]", "", ""),
        ("sft\n", "nowhere\n", "nowhere is neither an existing directory"),
    ],
)  # fmt: skip
def test_what_mergekit_moe_refuses(workplace: Path, expo, old: str, new: str, fault: str) -> None:
    (workplace / "spec.yml").write_text(MIXTURE.replace(old, new, 1))
    planned = expo("plan", "spec.yml")
    assert planned.code == (2 if fault else 0)
    assert fault in planned.err


def test_experts_that_nothing_tells_apart(workplace: Path, expo) -> None:
    hidden = MIXTURE.replace("random", "hidden")
    for text, fault in (
        (hidden.replace(", positive_prompts: [why]", ""), "experts.1: needs positive_prompts"),
        (hidden.replace("[why]", "[how many]"), "the prompts are the same for all"),
        (hidden.replace("source_model: aligned", "source_model: sft"), "are all the same model"),
    ):
        (workplace / "spec.yml").write_text(text)
        assert fault in expo("plan", "spec.yml").err
        assert expo("merge", "spec.yml", "out").code == 2


@pytest.mark.slow
def test_slices_that_list_the_base_may_end_early(workplace: Path, expo) -> None:
    text = SHORT.replace("linear", "task_arithmetic").replace("dtype", "base_model: sft\ndtype")
    (workplace / "spec.yml").write_text(text)
    assert expo("plan", "spec.yml").code == 0
    ran = expo("merge", "spec.yml", "out", verify=True)
    assert ran.code == 0, ran.err
    assert layers(workplace / "out") == {"0"}


@pytest.mark.slow
def test_adapters_are_added_by_mergekit_too(workplace: Path, expo) -> None:
    import torch
    from safetensors.torch import save_file

    adapter = workplace / "lora"
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{stem}.lora_A.weight": torch.ones(1, 64),
        f"{stem}.lora_B.weight": torch.ones(64, 1),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (workplace / "spec.yml").write_text(KARCHER.replace("model: aligned", "model: sft+lora"))
    ran = expo("merge", "spec.yml", "out", verify=True)
    assert ran.code == 0, ran.err
    out = workplace / "out"
    assert not any(path.is_dir() for path in out.iterdir())
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(workplace / "sft/model.safetensors")[name]
    assert not torch.equal(load_file(out / "model.safetensors")[name], before)


@pytest.mark.slow
def test_the_output_has_the_dtype_that_its_configuration_says(workplace: Path, expo) -> None:
    for dtype, stored in (("dtype: float16\n", "F16"), ("", "BF16")):
        text = "merge_method: arcee_fusion\nbase_model: sft\nmodels: [{model: sft}, {model: aligned}]\n"
        (workplace / "spec.yml").write_text(text + dtype)
        ran = expo("merge", "spec.yml", "out", "--overwrite", verify=True)
        assert ran.code == 0, ran.err
        assert json.loads((workplace / "out/expo.json").read_text())["dtypes"] == [stored]


@pytest.mark.slow
def test_other_vocabularies_are_fitted_to_the_bases(workplace: Path, expo) -> None:
    """`tokenizer_source: base` streams where the tables are of one size, and else needs surgery."""
    import torch
    from safetensors.torch import save_file

    text = UNION.replace("union", "base") + "base_model: sft\n"
    (workplace / "spec.yml").write_text(text)
    assert "expo's own, streaming" in expo("plan", "spec.yml").out
    tensors = load_file(workplace / "aligned/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    save_file(tensors, workplace / "aligned/model.safetensors", metadata={"format": "pt"})
    config = json.loads((workplace / "aligned/config.json").read_text()) | {"vocab_size": 36}
    (workplace / "aligned/config.json").write_text(json.dumps(config))
    planned = expo("plan", "spec.yml")
    assert "vocabularies of several sizes need mergekit's tokenizer surgery" in planned.out
    ran = expo("merge", "spec.yml", "out", verify=True)
    assert ran.code == 0, ran.err
    merged = load_file(workplace / "out/model.safetensors")
    assert len(merged["lm_head.weight"]) == 34
