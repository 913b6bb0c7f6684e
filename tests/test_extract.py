"""Adapters from a change, as peft and expo itself read them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import expo as door
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, OutputError
from expo.verbs import extract_lora

from .conftest import extrapolate, nudged, weights, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

SFT, ALIGNED = MODELS / "sft", MODELS / "aligned"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}


def with_peft(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    return {
        n: t.double() for n, t in with_peft(base, adapter).merge_and_unload().state_dict().items()
    }


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_an_adapter_of_full_rank_is_the_aligned_model(tmp_path: Path) -> None:
    result = door.extract_lora(ALIGNED, tmp_path / "lora", minus=SFT, rank=64, save_whole=True)
    assert result.energy == pytest.approx(1.0, abs=1e-9)
    ids = torch.randint(3, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    aligned = AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32)
    with torch.no_grad():
        expected = aligned(ids).logits
        got = with_peft(SFT, tmp_path / "lora")(input_ids=ids).logits
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert {other.saved for other in result.others} == {True}


@pytest.mark.parametrize("how", [{"rank": 6}, {"energy": 0.8}], ids=["rank", "energy"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_peft_adds_what_was_extracted(tmp_path: Path, how: dict, alpha: float) -> None:
    result = door.extract_lora(ALIGNED, tmp_path / "lora", minus=SFT, alpha=alpha, **how)
    sft, aligned, got = tensors(SFT), tensors(ALIGNED), merged(SFT, tmp_path / "lora")
    adapted = {f"{module.module}.weight": module for module in result.modules}
    assert len(adapted) == 14
    missed = whole = 0.0
    for name, tensor in sft.items():
        delta = aligned[name] - tensor
        kept = (got[name] - tensor) / alpha
        whole += float(delta.square().sum())
        missed += float((delta - kept).square().sum())
        if name not in adapted:
            assert torch.equal(got[name], tensor)
            continue
        report = adapted[name]
        error = float((delta - kept).norm() / delta.norm())
        assert report.error == pytest.approx(error, rel=1e-3)
        assert error < 1.01 * float((delta - best(delta, report.rank)).norm() / delta.norm())
        if "energy" in how:
            values = torch.linalg.svdvals(delta).square().cumsum(0)
            assert report.rank == int((values < 0.8 * values[-1]).sum()) + 1
    assert result.energy == pytest.approx(1 - missed / whole, abs=1e-5)
    assert {other.tensor for other in result.others} == sft.keys() - adapted.keys()
    assert not any(other.saved for other in result.others)


def test_every_reader_scales_alike(tmp_path: Path) -> None:
    """lora_alpha/r is one number for all modules, so a reader without alpha_pattern is right too."""
    door.extract_lora(ALIGNED, tmp_path / "lora", minus=SFT, energy=0.8, alpha=1.5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    ranks = {k.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): t.shape[0]
             for k, t in stored.items() if "lora_A" in k}  # fmt: skip
    assert len(set(ranks.values())) > 1
    assert config["r"] == max(ranks.values())
    assert config["lora_alpha"] / config["r"] == 1.5
    for module, rank in ranks.items():
        assert config["rank_pattern"].get(module, config["r"]) == rank
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) / rank == 1.5
    assert sorted(config["target_modules"]) == sorted(ranks)


def test_expo_reads_it_as_peft_does(tmp_path: Path) -> None:
    door.extract_lora(ALIGNED, tmp_path / "lora", minus=SFT, energy=0.9, dtype="bfloat16", save_whole=True)  # fmt: skip
    extrapolate(SFT, f"{SFT}+{tmp_path / 'lora'}", tmp_path / "out", alpha=1.0, dtype="float32")
    expected = merged(SFT, tmp_path / "lora")
    for name, tensor in tensors(tmp_path / "out").items():
        assert float((tensor - expected[name]).abs().max()) < 1e-6, name


def test_a_transposed_linear_module(tmp_path: Path) -> None:
    """GPT-2 holds the transpose of what a linear module does."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "sft")
    moved = load_file(tmp_path / "sft" / "model.safetensors")
    for name, tensor in moved.items():
        if "c_attn.weight" in name:
            tensor += 0.1 * torch.randn(tensor.shape[0], 2) @ torch.randn(2, tensor.shape[1])
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "config.json").write_text(
        (tmp_path / "sft" / "config.json").read_text()
    )
    save_file(moved, tmp_path / "aligned" / "model.safetensors", metadata={"format": "pt"})
    result = door.extract_lora(tmp_path / "aligned", tmp_path / "lora", minus=tmp_path / "sft", rank=2)  # fmt: skip
    assert [module.error < 1e-5 for module in result.modules] == [True]
    got = merged(tmp_path / "sft", tmp_path / "lora")
    (name,) = [n for n in moved if "c_attn.weight" in n]
    found = got[name if name in got else f"transformer.{name}"]
    assert float((found - moved[name].double()).abs().max()) < 1e-5


def test_the_command(tmp_path: Path, expo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = expo("extract-lora", ALIGNED, "--minus", SFT, "--rank", 4)
    assert ran.code == 0, ran.err
    assert "14 modules of rank 4 hold" in ran.out
    assert "left as in SFT, 7 tensors that changed" in ran.out
    out = tmp_path / "aligned-lora"
    manifest = json.loads((out / "expo.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        *manifest["files"],
        *manifest["beside"],
        "expo.json",
    }
    assert str(MODELS) not in "".join(p.read_text() for p in out.iterdir() if p.suffix != ".safetensors")  # fmt: skip
    assert all(path.stat().st_mode & 0o044 for path in out.iterdir())
    taken = expo("extract-lora", ALIGNED, "--minus", SFT, "--rank", 4)
    assert (taken.code, "exists and is not empty" in taken.err) == (1, True)
    assert expo("extract-lora", ALIGNED, "--minus", SFT, "--rank", 4, "--overwrite", "-q").code == 0
    ran = expo("extract-lora", ALIGNED, "x", "--minus", SFT, "--energy", 0.5, "--json")
    assert json.loads(ran.out)["scale"] == 1.0
    assert expo("extract-lora", ALIGNED, "y", "--minus", SFT).err.strip() == "expo: give --rank or --energy, one of them"  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"aligned-lora", "x"}


def test_what_cannot_be_extracted(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights())
    with pytest.raises(CheckpointError, match="no linear module differs"):
        door.extract_lora(base, tmp_path / "lora", minus=write_checkpoint(tmp_path / "same", weights()), rank=2)  # fmt: skip
    wide = weights() | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(10, 12)}
    write_checkpoint(tmp_path / "wide", wide)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight"):
        door.extract_lora(tmp_path / "wide", tmp_path / "lora", minus=base, rank=2)
    broken = nudged(weights())
    broken["model.layers.1.mlp.up_proj.weight"][2, 3] = float("inf")
    write_checkpoint(tmp_path / "broken", broken)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        door.extract_lora(tmp_path / "broken", tmp_path / "lora", minus=base, rank=2)
    with pytest.raises(OutputError, match="overlaps the input"):
        door.extract_lora(base, base / "in", minus=tmp_path / "same", rank=2)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "same", "wide", "broken"}


def test_stacks_of_experts_are_no_linear_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are read an expert at a time."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    sft = weights() | {name: torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(1))}
    aligned = sft | {name: sft[name] * 1.01}
    for side, held in (("sft", sft), ("aligned", aligned)):
        write_checkpoint(tmp_path / side, held)
    counts, read = [], extract_lora.read_tensor

    def counted(inputs: object, side: object, count: int, *more: object, **named: object) -> object:
        counts.append(count)
        return read(inputs, side, count, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(extract_lora, "read_tensor", counted)
    why = rf"nothing to put in an adapter; what differs is {name} \(is a stack of experts, which is no linear module\)"
    with pytest.raises(CheckpointError, match=why):
        door.extract_lora(tmp_path / "aligned", tmp_path / "out", minus=tmp_path / "sft", rank=2)
    assert counts.count(32) == 12
    sft["model.layers.0.mlp.up_proj.weight"] = sft["model.layers.0.mlp.up_proj.weight"] * 2
    write_checkpoint(tmp_path / "other", sft)
    result = door.extract_lora(tmp_path / "aligned", tmp_path / "out", minus=tmp_path / "other", rank=10)  # fmt: skip
    (stack,) = result.others
    assert stack.relative_delta == pytest.approx(0.01, rel=1e-3)
