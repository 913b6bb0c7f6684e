"""Other forms of input: legacy .bin files and LoRA adapters, compared with torch and peft."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import expo as door

from .conftest import CONFIG, Tensors, extrapolate, nudged, weights, write_checkpoint
from .test_merge import assert_same, load, naive
from .test_plan import plan


def write_bin(folder: Path, tensors: Tensors, *, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_as_either_side(tmp_path: Path, shards: int) -> None:
    sft = weights()
    aligned = nudged(sft)
    aligned["lm_head.weight"] = aligned["model.embed_tokens.weight"]  # one storage, twice named
    aligned["mask"] = torch.tensor([True, False])
    sft["mask"] = torch.tensor([True, False])
    write_bin(tmp_path / "bin", aligned, shards=shards)
    write_checkpoint(tmp_path / "sft", sft)
    report = plan(tmp_path / "sft", tmp_path / "bin")
    assert report.ok, report.refusals
    extrapolate(tmp_path / "sft", tmp_path / "bin", tmp_path / "out", alpha=1.5)
    out = load(tmp_path / "out")
    assert torch.equal(out.pop("mask"), torch.tensor([True, False]))
    floats = {n: t for n, t in aligned.items() if n != "mask"}
    assert_same(out, naive(sft, floats, 1.5))
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    expected = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    )
    assert names == expected
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_a_view_into_a_larger_storage(tmp_path: Path) -> None:
    storage = torch.randn(40)
    write_bin(tmp_path / "sft", {"w": storage[10:30].view(4, 5)})
    write_bin(tmp_path / "aligned", {"w": storage[12:32].view(4, 5)})
    extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", alpha=2.0)
    expected = naive({"w": storage[10:30].view(4, 5)}, {"w": storage[12:32].view(4, 5)}, 2.0)
    assert_same(load(tmp_path / "out"), expected)


def tiny_model(seed: int = 0) -> MistralForCausalLM:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return MistralForCausalLM(config)


def trained_adapter(base: Path, folder: Path, seed: int, **options: object) -> PeftModel:
    """An adapter with random matrices, saved by peft."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options
    peft = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name or name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    peft.save_pretrained(folder)
    return peft


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3}},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_what_peft_merges(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    peft = trained_adapter(base, tmp_path / "lora", 1, **ADAPTERS[kind])
    merged = peft.merge_and_unload()
    extrapolate(base, f"{base}+{tmp_path / 'lora'}", tmp_path / "out", alpha=1.0)
    out = load(tmp_path / "out")
    expected = merged.state_dict()
    assert out.keys() <= expected.keys()
    for name, tensor in out.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-7), name
    extrapolate(base, f"{base}+{tmp_path / 'lora'}", tmp_path / "far", alpha=1.5)
    start = load(base)
    for name, tensor in load(tmp_path / "far").items():
        reference = start[name].double() + 1.5 * (expected[name].double() - start[name].double())
        assert torch.allclose(tensor.double(), reference, rtol=1e-5, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "embedding"])
def test_expo_of_an_adapter_is_the_adapter_scaled(tmp_path: Path, kind: str) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    tiny_model().save_pretrained(base)
    trained_adapter(base, lora, 1, **ADAPTERS[kind])
    extrapolate(base, f"{base}+{lora}", tmp_path / "far", alpha=1.5)
    config = json.loads((lora / "adapter_config.json").read_text())
    config["lora_alpha"] *= 1.5
    config["alpha_pattern"] = {name: 1.5 * a for name, a in config["alpha_pattern"].items()}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    extrapolate(base, f"{base}+{lora}", tmp_path / "scaled", alpha=1.0)
    scaled = load(tmp_path / "scaled")
    for name, tensor in load(tmp_path / "far").items():
        assert torch.allclose(tensor, scaled[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_both_sides_and_the_donor_of_the_tokenizer(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model().bfloat16().save_pretrained(base)
    first = trained_adapter(base, tmp_path / "first", 1)
    second = trained_adapter(base, tmp_path / "second", 2)
    (base / "tokenizer_config.json").write_text('{"from": "base"}')
    (tmp_path / "second" / "tokenizer_config.json").write_text('{"from": "adapter"}')
    out = tmp_path / "out"
    extrapolate(f"{base}+{tmp_path}/first", f"{base}+{tmp_path}/second", out, alpha=1.5)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"from": "adapter"}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    name = "model.layers.0.self_attn.q_proj"
    start = load(base)[f"{name}.weight"].float()
    sides = []
    for peft in (first, second):
        a, b = (
            peft.get_submodule(f"base_model.model.{name}.lora_{x}.default").weight.float()
            for x in "AB"
        )
        sides.append(start + 6 / 4 * (b @ a))
    expected = sides[0] + 1.5 * (sides[1] - sides[0])
    result = load(out)[f"{name}.weight"]
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.float(), expected.detach(), rtol=2**-8, atol=1e-6)
    manifest = json.loads((out / "expo.json").read_text())
    source = manifest["sources"]["aligned"]
    assert (source["model"], source["adapter"]) == ("base", "second")
    assert source["commit"] is source["adapter_commit"] is None


BAD_ADAPTERS = {
    "dora": ({"use_dora": True}, {}, "uses DoRA magnitudes (use_dora), which expo cannot add"),
    "kind": ({"peft_type": "IA3"}, {}, "is a IA3 adapter; expo adds LoRA adapters only"),
    "shape": ({}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 31)}, "adapts model.layers.0.self_attn.q_proj.weight as [32, 31], the base has [32, 32]: is it the right base?"),
    "unknown module": ({}, {"base_model.model.model.layers.9.q.lora_A.weight": (4, 32), "base_model.model.model.layers.9.q.lora_B.weight": (32, 4)}, "adapts model.layers.9.q.weight, which the base lacks"),
    "no partner": ({}, {"base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight": (4, 32)}, "without its B matrix"),
    "unknown key": ({}, {"base_model.model.x.lora_magnitude_vector": (4,)}, "holds base_model.model.x.lora_magnitude_vector, which expo does not know"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_adapters_that_cannot_be_added_are_refused(tmp_path: Path, kind: str) -> None:
    config, tensors, message = BAD_ADAPTERS[kind]
    base, lora = tmp_path / "base", tmp_path / "lora"
    tiny_model().save_pretrained(base)
    trained_adapter(base, lora, 1)
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    weights_path = lora / "adapter_model.safetensors"
    changed = load_file(weights_path) | {n: torch.ones(shape) for n, shape in tensors.items()}
    save_file(changed, weights_path)
    with pytest.raises(door.CheckpointError) as caught:
        plan(base, Path(f"{base}+{lora}"))
    assert message in str(caught.value)


def test_a_resized_vocabulary_in_the_adapter(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    sft = weights()
    write_checkpoint(base, sft)
    lora.mkdir()
    (lora / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": 2})
    )
    grown = {
        f"base_model.model.{n}": torch.cat([sft[n], torch.ones(2, 10).bfloat16()])
        for n in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file(grown, lora / "adapter_model.safetensors")
    vocabulary = {f"t{i}": i for i in range(12)}
    for folder, more in ((base, {}), (lora, {"x": 12, "y": 13})):
        content = {"model": {"vocab": vocabulary | more}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    extrapolate(base, f"{base}+{lora}", tmp_path / "out", alpha=1.5)
    out = load(tmp_path / "out")
    assert out["lm_head.weight"].shape == (14, 10)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 14
