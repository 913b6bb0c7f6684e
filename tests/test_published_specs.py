"""Specs as mergekit's users write them: what it takes is taken, what it ignores is said."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
import yaml
from safetensors.torch import load_file

import expo as door
from expo.errors import SpecError
from expo.operators.methods import NOT_IN_MERGEKIT
from expo.spec.inputs import KNOWN
from expo.spec.read import read_spec
from expo.spec.stages import read_stages
from tests.conftest import CONFIG, nudged, weights, write_checkpoint

SLERP = """\
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t: 0.5
dtype: bfloat16
"""
TIES = """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.5}}
  - {model: b, parameters: {weight: 0.5, density: 0.5}}
dtype: bfloat16
"""
SLICED = """\
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models `base`, `a` and `b` of two layers, in the working directory."""
    base = weights()
    for number, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, nudged(base, seed=number) if number else base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(text: str) -> str:
    """What the plan of a spec warns of."""
    Path("spec.yml").write_text(text)
    report = door.plan("spec.yml")
    assert report.ok, report.refusals
    return "\n".join(report.warnings)


IGNORED = {
    "a key at the top": (TIES + "int8_mask: true\n", "7:1: int8_mask: is not a known key (it goes under parameters:, and has no effect): ignored"),
    "a misspelt key": (TIES.replace("dtype", "dype"), "6:1: dype: is not a known key (did you mean dtype?): ignored"),
    "a key of the tokenizer": (TIES + "pad_to_multiple_of: 8\n", "(it goes under tokenizer:): ignored"),
    "a seed": (TIES + "random_seed: 1\n", "7:1: random_seed: is not a known key (did you mean seed?): ignored"),
    "an adapter": (SLERP.replace("{model: b}", "{model: b, lora: c}"), "3:33: models.1.lora: is not a known key (model: NAME+ADAPTER adds an adapter): ignored, nothing is added"),
    "a revision": (SLERP.replace("{model: b}", "{model: b, revision: main}"), "(model: NAME@REVISION names one): ignored"),
    "another method's parameter": (SLERP.replace("t: 0.5", "t: 0.5\n  select_topk: 0.1"), "6:3: parameters.select_topk: is not a parameter of slerp (sce takes it; slerp takes t): ignored"),
    "nobody's parameter": (SLERP.replace("t: 0.5", "t: 0.5\n  embed_slerp: true"), "6:3: parameters.embed_slerp: is not a parameter of slerp: ignored"),
    "a misspelt parameter": (TIES.replace("dtype", "parameters: {nomalize: true}\ndtype"), "parameters.nomalize: is not a parameter of ties (did you mean normalize?): ignored"),
    "pattern for filter": (SLERP.replace("t: 0.5", "t: [{pattern: mlp, value: 0.3}]"), "5:8: parameters.t.0.pattern: is not a known key (did you mean filter?): ignored, the value holds for every tensor"),
    "a key twice": (SLERP + "dtype: bfloat16\n", "7:1: dtype: the key is given twice"),
    "a path of ours": (SLERP + "out_path: x\n", "(OUT stands on the command line): ignored"),
}  # fmt: skip


@pytest.mark.parametrize("case", IGNORED.values(), ids=IGNORED)
def test_what_mergekit_ignores_is_a_warning(case: tuple[str, str], place: Path, expo) -> None:
    text, warning = case
    assert warning in planned(text)
    assert warning in expo("merge", "spec.yml", "out").err
    refused = expo("plan", "spec.yml", "--strict")
    assert refused.code == 2
    assert warning.partition(": ignored")[0] in refused.err
    assert expo("merge", "spec.yml", "other", "--strict").code == 2
    assert not Path("other").exists()


def test_a_spec_of_ours_is_always_strict(place: Path, expo) -> None:
    text = "merge_method: expo\nbase_model: base\nmodels: [{model: a, parameters: {alpha: 1.5}}]\n"
    for more, fault in (
        ("random_seed: 1\n", "random_seed: is not a known key (did you mean seed?)"),
        ("base_model: base\n", "base_model: the key is given twice"),
    ):
        Path("spec.yml").write_text(text + more)
        refused = expo("plan", "spec.yml")
        assert refused.code == 2
        assert fault in refused.err
    Path("spec.yml").write_text(text.replace("{alpha: 1.5}", "{alpha: 1.5, weight: 1}"))
    assert "weight: is not a parameter of expo (linear takes it; expo takes alpha" in (
        expo("plan", "spec.yml").err
    )


SAME = {
    "numbers and booleans as text": TIES.replace("0.5", '"0.5"') + 'parameters: {normalize: "yes"}\n',
    "exponents without a point": TIES.replace("0.5", "5e-1"),
    "a dtype with its library": TIES.replace("bfloat16", "torch.bfloat16"),
    "a dtype in short": TIES.replace("bfloat16", "bf16"),
    "a model as a mapping": TIES.replace("model: a,", "model: {model: {path: a}},"),
    "a base as a mapping": TIES.replace("base_model: base", "base_model: {model: {path: base}}"),
    "an anchor": TIES.replace("parameters: {weight", "parameters: &p {weight", 1).replace("parameters: {weight: 0.5, density: 0.5}", "parameters: *p"),
    "a merge key": TIES.replace("{weight: 0.5, density: 0.5}", "&p {weight: 0.5, density: 0.5}", 1).replace("parameters: {weight: 0.5,", "parameters: {<<: *p,"),
    "whole floats as layers": """\
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0.0, 2.0]}
      - {model: a, layer_range: ["0", 2.0], parameters: {weight: 0.5, density: 0.5}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.5}}
dtype: bfloat16
""",
}  # fmt: skip


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_other_forms_say_the_same(text: str, place: Path, expo) -> None:
    Path("plain.yml").write_text(TIES)
    Path("spec.yml").write_text(text)
    assert expo("merge", "plain.yml", "plain").code == 0
    ran = expo("merge", "spec.yml", "out")
    assert ran.code == 0, ran.err
    for file in Path("plain").glob("*.safetensors"):
        assert file.read_bytes() == (Path("out") / file.name).read_bytes()


def test_yaml_that_holds_itself_or_too_much(place: Path) -> None:
    bomb = "a: &a [1]\n" + "".join(
        f"b{n}: &b{n} [{', '.join([f'*{p}'] * 9)}]\n"
        for n, p in enumerate(["a", *(f"b{m}" for m in range(9))])
    )
    for text in (TIES + "x: &x [*x]\n", TIES + bomb):
        Path("spec.yml").write_text(text)
        with pytest.raises(SpecError, match="an alias that holds itself, or too many of them"):
            read_spec("spec.yml")
    Path("spec.yml").write_text(TIES + "<<: 3\n")
    with pytest.raises(SpecError, match="<< takes mappings"):
        read_spec("spec.yml")


def test_the_nearest_of_several_merge_keys_wins(place: Path) -> None:
    text = """\
x: &x {weight: 0.1, density: 0.2}
y: &y {weight: 0.3, gamma: 0.4}
merge_method: breadcrumbs
base_model: org/base
models:
  - {model: org/a, parameters: {<<: [*x, *y], density: 0.9}}
"""
    path = Path("spec.yml")
    path.write_text(text)
    (operand,) = read_spec(path).operands
    assert operand.settings == {"weight": 0.1, "density": 0.9, "gamma": 0.4}


def test_the_base_alone_bakes_its_adapter_in(place: Path, expo) -> None:
    adapter = place / "lora"
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    from safetensors.torch import save_file

    factors = {
        f"{stem}.lora_A.weight": torch.ones(1, 10),
        f"{stem}.lora_B.weight": torch.ones(10, 1),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    Path("spec.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base+lora\nmodels: [{model: base+lora}]\n"
    )
    ran = expo("merge", "spec.yml", "out")
    assert ran.code == 0, ran.err
    assert "task_arithmetic of the base alone: the output is base+lora" in ran.err
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (
        load_file("base/model.safetensors")[name],
        load_file("out/model.safetensors")[name],
    )
    assert torch.equal(after, (before.float() + 1).bfloat16())


REFUSED = {
    "a base that is not among the sources": (SLICED.replace("- {model: base, ", "- {model: b, "), "4:5: slices.0.sources: the base_model base is not among them"),
    "a model twice": (TIES.replace("model: b", "model: a"), "5:6: models.1.model: a is listed twice"),
    "a missing weight": (TIES.replace("{weight: 0.5, density", "{density", 1), "4:5: models.0: needs weight: ties has no default for it"),
    "a missing t": (SLERP.replace("t: 0.5", "weight: 0.5"), "4:1: parameters: needs t: slerp has no default for it"),
    "a base that counts": ("merge_method: linear\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n", "2:1: base_model: linear counts it among its models: list it under models with a weight"),
    "no base": (SLERP.replace("base_model: a\n", ""), "base_model: is required by slerp"),
    "too many": (SLERP.replace("base_model: a", "base_model: base"), "3:1: models: slerp takes 1 model beside the base, not 2"),
    "a missing weight of mergekit's": ("merge_method: multislerp\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]\n", "2:10: models.0: needs weight"),
    "too few for mergekit's": ("merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]\n", "3:1: models: model_stock takes at least 2 models beside the base, not 1"),
    "other lengths": (SLICED.replace("{model: a, layer_range: [0, 2]", "{model: a, layer_range: [0, 1]"), "takes 1 layers"),
    "layers backwards": (SLICED.replace("[0, 2]", "[2, 0]"), "is [first, after the last], not [2, 0]"),
    "two values": (TIES + "dtype: float32\n", "7:1: dtype: the key is given twice, with two values"),
    "a flag that is none": (TIES + "parameters: {normalize: 2}\n", "7:14: parameters.normalize: is true or false, not 2"),
    "a negative density": (TIES.replace("density: 0.5", "density: -0.5", 1), "4:42: models.0.parameters.density: is a share from 0 to 1, not -0.5"),
    "a density above 1": (TIES.replace("density: 0.5", "density: [1, 5]", 1), "density: is a share from 0 to 1, not 5"),
    "an epsilon": (TIES.replace("ties", "della").replace("density: 0.5", "epsilon: 1.5", 1), "epsilon: is a share from 0 to 1, not 1.5"),
    "a gamma": (TIES.replace("ties", "breadcrumbs").replace("density: 0.5", "gamma: -1", 1), "gamma: is a share from 0 to 1, not -1"),
    "mergekit's own command": ("merge_method: tokensurgeon\n", "is a command of mergekit's: mergekit-tokensurgeon MODEL DONOR OUT"),
    "models and slices": (SLICED + "models: []\n", "give either models or slices"),
    "no models": ("merge_method: ties\nbase_model: base\nmodels: []\n", "3:1: models: ties needs at least 1 model"),
    "text for a mapping": (TIES + "parameters: lots\n", "7:1: parameters: should be keys with values, not 'lots'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_real_faults_are_refused_by_plan(case: tuple[str, str], place: Path, expo) -> None:
    text, fault = case
    Path("spec.yml").write_text(text)
    refused = expo("plan", "spec.yml")
    assert refused.code == 2, refused.out
    assert fault in refused.err
    assert not any(word in refused.err for word in ("nput should", "valid dictionary"))


LATER = {
    "weights that add up to 0": ("merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: -1}}\n", "add up to 0 (1, -1), and normalize divides by their sum"),
    "layers that the model lacks": (SLICED.replace("[0, 2]", "[0, 3]"), "slices end at layer 3, base has 2: take fewer"),
    "more fixed layers than there are": ("merge_method: expo\nbase_model: base\nmodels: [{model: a, parameters: {alpha: 1.5}}]\nfix_first_layers: 9\n", "fix_first_layers: 9, but a has 2 layers"),
    "edits of layers that the model lacks": ("merge_method: passthrough\nmodels: [{model: a}]\nedits: [{laser: {keep: gd, layers: [0, 99]}}]\n", "layers 0 99: a has 2 layers, 0 to 1"),
    "layers for mergekit": ("merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: b, layer_range: [1, 9]}]\n", "layer_range [1, 9]: b has 2 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER.values(), ids=LATER)
def test_what_the_headers_tell_against_it_is_refused_by_plan(
    case: tuple[str, str], place: Path, expo
) -> None:
    text, refusal = case
    Path("spec.yml").write_text(text)
    refused = expo("plan", "spec.yml")
    assert refused.code in (1, 2)
    assert refusal in refused.out + refused.err
    merged = expo("merge", "spec.yml", "out")
    assert merged.code in (1, 2)
    assert refusal in merged.err


def test_vocabularies_of_two_sizes_need_one_for_mergekit(place: Path) -> None:
    tensors = nudged(weights(), seed=5)
    taller = {
        name: torch.cat([t, t[:1]]) if t.shape == (12, 10) else t for name, t in tensors.items()
    }
    write_checkpoint(place / "tall", taller, config=CONFIG | {"vocab_size": 13})
    spec = {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "tall"}]}
    (refusal,) = door.plan(spec).refusals
    assert "[12, 10] in a, [13, 10] in tall; tokenizer_source: union makes one" in refusal
    assert door.plan(spec | {"tokenizer_source": "union"}).ok


def test_one_weight_that_is_normalized_away(place: Path) -> None:
    text = TIES.replace("  - {model: b, parameters: {weight: 0.5, density: 0.5}}\n", "")
    text = text.replace("weight: 0.5", "weight: -0.5")
    assert "the only one, -0.5, counts as 1" in planned(text)
    assert "counts as 1" not in planned(text + "parameters: {normalize: false}\n")


def test_an_untied_head_beside_a_tied_one_follows_the_aligned_model(place: Path) -> None:
    tied = {k: v for k, v in weights(seed=4).items() if k != "lm_head.weight"}
    write_checkpoint(place / "tied", tied, config=CONFIG | {"tie_word_embeddings": True})
    report = door.plan(
        {
            "merge_method": "expo",
            "base_model": "base",
            "models": [{"model": "tied", "parameters": {"alpha": 1.5}}],
        }
    )
    assert report.ok
    assert any("lm_head.weight is only in" in note for note in report.notes)


def test_methods_are_mergekits() -> None:
    """Every method it has, with the parameters, defaults and bases that it documents."""
    from mergekit.merge_methods.registry import registered_methods

    theirs = {method.spec.name: method.spec for method in registered_methods()}
    assert KNOWN.keys() - {*NOT_IN_MERGEKIT} == theirs.keys()
    for name, spec in theirs.items():
        takes = KNOWN[name]
        wanted = {p.name for p in spec.parameters} - {"int8_mask"}
        assert takes.each.keys() | takes.shared.keys() == wanted, name
        required = {p.name for p in spec.parameters if p.required}
        given = {**takes.each, **takes.shared}
        assert {key for key, default in given.items() if default is None} == required, name
        base = {"required": "required", "optional": "optional", "ignored": "operand"}
        assert takes.base == base[spec.contract.base.value], name
        least = 0 if takes.adds_to_base else takes.models[0]
        beside = takes.base == "required"
        if spec.contract.min_non_base is None:
            assert least + beside == spec.contract.min_inputs, name
            assert takes.models[1] in (
                None,
                spec.contract.max_inputs and spec.contract.max_inputs - beside,
            )
        else:
            assert takes.models == (spec.contract.min_non_base, spec.contract.max_non_base), name


CHAIN = """\
merge_method: linear
models:
  - {model: half, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
---
name: half
merge_method: linear
models: [{model: base, parameters: {weight: 0.5}}, {model: a, parameters: {weight: 0.5}}]
"""


def test_documents_are_planned_on_each_others_outputs(place: Path, expo) -> None:
    Path("spec.yml").write_text(CHAIN)
    for words in (("plan", "spec.yml"), ("merge", "spec.yml", "out", "--dry-run")):
        shown = expo(*words)
        assert shown.code == 0, shown.err
        assert "document 1 of 2: half" in shown.out
        assert "document 2 of 2: OUT" in shown.out
        assert "model 1    half (of an earlier document)" in shown.out
        first, second = json.loads(expo(*words, "--json").out)
        assert second["sources"]["model 1"]["model"] == "half"
        assert second["write_bytes"] == first["write_bytes"]
    assert not Path("out").exists()
    results = json.loads(expo("merge", "spec.yml", "out", "--json").out)
    assert [Path(result["out"]).name for result in results] == ["half", "out"]


def test_a_later_document_is_refused_before_the_first_runs(place: Path, expo) -> None:
    Path("spec.yml").write_text(CHAIN.replace("model: b,", "model: nowhere,"))
    refused = expo("merge", "spec.yml", "out")
    assert refused.code == 2
    assert "nowhere is neither an existing directory nor a Hub id" in refused.err
    assert not list(place.glob("*.expo-parts")) + list(place.glob(".*expo-parts"))
    write_checkpoint(place / "wide", {"model.norm.weight": torch.ones(11)})
    Path("spec.yml").write_text(CHAIN.replace("model: b,", "model: wide,"))
    assert expo("plan", "spec.yml").code == 1
    assert "only in the donor" in expo("merge", "spec.yml", "out").err


def test_stacked_layers_are_planned_on(place: Path, expo) -> None:
    stacked = """\
name: tall
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 2]}]
---
merge_method: linear
slices:
  - sources: [{model: tall, layer_range: [0, 3], parameters: {weight: 1}}]
"""
    Path("spec.yml").write_text(stacked)
    planned = json.loads(expo("plan", "spec.yml", "--json").out)
    assert planned[1]["tensors"]["matched"] == len(weights()) + 3
    Path("spec.yml").write_text(stacked.replace("[0, 3]", "[0, 4]"))
    assert "slices end at layer 4, tall has 3" in expo("plan", "spec.yml").err


def test_documents_that_need_each_other(place: Path) -> None:
    for text, fault in (
        (CHAIN.replace("model: base", "model: last").replace("merge_method", "name: last\nmerge_method", 1), "need each other's output"),
        (CHAIN.replace("name: half\n", ""), "only one document goes without a name"),
        (CHAIN.replace("name: half", "name: a/b"), "is taken or is not a plain name"),
    ):  # fmt: skip
        Path("spec.yml").write_text(text)
        with pytest.raises(SpecError, match=fault):
            read_stages(Path("spec.yml"))


def test_a_recipe_that_is_misspelt_is_suggested(expo) -> None:
    refused = expo("plan", "starling-lm-7b-beta-exp")
    assert refused.code == 2
    assert "did you mean starling-lm-7b-beta-expo?" in refused.err


def test_the_list_as_json_has_whole_titles(expo) -> None:
    listed = json.loads(expo("merge", "--json", "--list").out)
    assert all(recipe["title"].endswith(".") for recipe in listed)
    assert expo("merge").code == 2


def test_a_printed_spec_as_json(pair, expo) -> None:
    words = ("extrapolate", pair.sft, pair.aligned, "out", "--alpha", 1.5, "--print-spec")
    assert json.loads(expo(*words, "--json").out) == yaml.safe_load(expo(*words).out)


def test_a_size_without_a_unit_is_bytes(pair, tmp_path: Path, expo) -> None:
    words = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5)
    refused = expo(*words, "--max-shard-size", 5)
    assert refused.code == 2
    assert "5 means bytes: say which unit, like 5GB" in refused.err
    assert expo(*words, "--max-shard-size", 1_000_000, "--dtype", "bf16").code == 0


def test_a_key_of_golden_vectors_is_named_as_it_is_written(tmp_path: Path) -> None:
    from expo.verification.golden import read_golden

    (tmp_path / "v.yml").write_text(
        "schemo: expo.golden/1\nschema: expo.golden/1\nname: a\nsource: b\ncases: []\n"
    )
    with pytest.raises(SpecError, match=r"did you mean schema\?"):
        read_golden(tmp_path / "v.yml")


def test_whoever_copies_a_spec_may_copy_a_folder(place: Path) -> None:
    """`./a` and `a` are one model."""
    copytree("a", "c")
    assert read_spec(
        {"merge_method": "linear", "models": [{"model": "./c", "parameters": {"weight": 1}}]}
    )


def test_another_architecture_is_mergekits(place: Path) -> None:
    model = {"model": {"path": "a"}, "override_architecture": "LlamaForCausalLM"}
    spec = {"merge_method": "passthrough", "models": [{"model": model}]}
    foreign = read_spec(spec).foreign
    assert foreign is not None
    assert foreign.reasons == ("override_architecture is mergekit's",)
    assert foreign.spec["models"][0]["model"] == model | {"model": "a"}
    assert [str(reference) for reference in foreign.models.values()] == ["a"]


def test_an_adapter_on_an_earlier_output(place: Path) -> None:
    Path("spec.yml").write_text(CHAIN.replace("model: half,", "model: half+b,"))
    first, last = read_stages(Path("spec.yml"))
    assert (first.name, last.name) == ("half", None)
    request = last.request({"half": Path("a")})
    assert [str(operand.reference) for operand in request.operands] == ["a+b", "b"]


def test_a_base_that_linear_slices_do_not_list_only_gives_its_files(place: Path, expo) -> None:
    text = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 1}}
dtype: bfloat16
"""
    Path("spec.yml").write_text(text)
    assert expo("merge", "spec.yml", "without").code == 0
    Path("spec.yml").write_text(text + "base_model: base\n")
    ran = expo("merge", "spec.yml", "with")
    assert ran.code == 0, ran.err
    ours, theirs = (load_file(f"{out}/model.safetensors") for out in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
