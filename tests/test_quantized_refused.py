"""Quantized inputs that are damaged, contradict themselves or are of another kind: one line, and no OUT."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import expo as door

from .conftest import Ran, Tensors, weights, write_checkpoint
from .quantized import FP8, fp8, mxfp4, quantized, write_quantized

Expo = Callable[..., Ran]

BLOCK = (16, 8)
NAME = "model.layers.0.mlp.up_proj.weight"  # [33, 10]: scales [3, 2]
SECTION = FP8 | {"weight_block_size": [*BLOCK]}
CODES = torch.zeros(33, 10).to(torch.float8_e4m3fn)
EXPERTS = "model.layers.0.mlp.experts.up_proj"
BLOCKS, POWERS = mxfp4(torch.ones(2, 3, 64))


def groups(**of_weights: object) -> dict:
    return {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": of_weights}}}


Case = tuple[Tensors, dict | None, str]

BY_HEADERS: dict[str, Case] = {
    "no scale": ({NAME: CODES}, SECTION, f"sft is quantized ({NAME} is F8_E4M3), and there is no {NAME}_scale_inv and no {NAME}_scale beside it: name the unquantized original"),
    "another grid than config.json says": ({NAME: CODES, NAME + "_scale_inv": torch.ones(3, 1)}, SECTION, f"{NAME}_scale_inv is [3, 1] for {NAME} of [33, 10], and config.json says a scale for 16 × 8: these do not fit each other; download the model again"),
    "blocks where config.json says rows": ({NAME: CODES, NAME + "_scale": torch.ones(3, 2)}, groups(strategy="channel"), "config.json says a scale a row"),
    "blocks that nobody knows": ({NAME: CODES, NAME + "_scale": torch.ones(10, 10)}, None, "these do not fit each other; a size of blocks that is no power of two has to stand in config.json (weight_block_size)"),
    "too many dimensions": ({NAME: CODES, NAME + "_scale": torch.ones(1, 3, 2)}, None, "is [1, 3, 2] for"),
    "a flat scale": ({NAME: CODES, NAME + "_scale": torch.ones(33)}, None, "is [33] for " + NAME + " of [33, 10]: these do not fit each other; a scale a row has the shape [33, 1]"),
    "a scale of whole numbers": ({NAME: CODES, NAME + "_scale": torch.ones(33, 1, dtype=torch.int32)}, None, f"({NAME}_scale is I32), and the scales of such codes are F32, BF16, F16, F8_E8M0, U8: name"),
    "two scales": ({NAME: CODES, NAME + "_scale": torch.ones(1), NAME + "_scale_inv": torch.ones(1)}, None, "are both there), and one of them is its scale"),
    "a scale of nothing": ({NAME + "_scale_inv": torch.ones(3, 2)}, None, f"({NAME}_scale_inv is F32), and no codes that it could be the scale of are beside it"),
    "blocks without scales": ({EXPERTS + "_blocks": BLOCKS}, None, f"({EXPERTS}_blocks is U8), and there is no {EXPERTS}_scales beside it"),
    "scales without blocks": ({EXPERTS + "_scales": POWERS}, None, f"({EXPERTS}_scales is U8), and no codes"),
    "blocks of another shape": ({EXPERTS + "_blocks": BLOCKS[..., :8].contiguous(), EXPERTS + "_scales": POWERS}, None, f"{EXPERTS}_scales is [2, 3, 2] for {EXPERTS}_blocks of [2, 3, 2, 8]"),
    "scales of other blocks": ({EXPERTS + "_blocks": BLOCKS, EXPERTS + "_scales": POWERS[:1].contiguous()}, None, "these do not fit each other"),
    "scales that are no powers": ({EXPERTS + "_blocks": BLOCKS, EXPERTS + "_scales": POWERS.float()}, None, "is F32), and the scales of such codes are F8_E8M0, U8"),
    "the weight beside its codes": ({EXPERTS: torch.ones(2), EXPERTS + "_blocks": BLOCKS, EXPERTS + "_scales": POWERS}, None, "are both there), and one of them is the weight"),
    "packed": ({NAME + "_packed": torch.ones(2, dtype=torch.uint8), NAME + "_scale": torch.ones(2).to(torch.float8_e4m3fn), NAME + "_global_scale": torch.ones(1)}, groups(strategy="tensor_group", group_size=16), f"sft is quantized ({NAME}_"),
    "E5M2": ({NAME: torch.zeros(33, 10).to(torch.float8_e5m2), NAME + "_scale": torch.ones(1)}, None, f"({NAME} is F8_E5M2), its codes cannot be added"),
    "INT8": ({NAME: torch.zeros(33, 10, dtype=torch.int8), NAME + "_scale": torch.ones(33, 1)}, groups(strategy="channel"), f"({NAME}_scale is F32), and no codes"),
    "a zero point": ({NAME: CODES, NAME + "_scale": torch.ones(1), NAME + "_zero_point": torch.ones(1)}, None, f"({NAME}_zero_point is F32)"),
    "columns in another order": ({NAME: CODES, NAME + "_scale": torch.ones(33, 2), NAME + "_g_idx": torch.zeros(10, dtype=torch.int32)}, groups(strategy="group", group_size=5, actorder="group"), f"({NAME}_g_idx is I32), and its columns are in groups of another order (actorder): name"),
    "GPTQ": ({NAME: CODES, NAME + "_scale": torch.ones(1)}, {"quant_method": "gptq"}, "sft is quantized (gptq), its codes cannot be added: name the unquantized original"),
    "a transform": ({NAME: CODES, NAME + "_scale": torch.ones(1)}, groups(strategy="tensor") | {"transform_config": {"config_groups": {"u": {}}}}, "(compressed-tensors with a transform of its weights)"),
    "codes that are not there": ({}, SECTION, "config.json says that it is quantized (fp8), and no tensor holds codes: if its weights are plain, remove quantization_config and compression_config from config.json"),
    "a block of nothing": ({NAME: CODES, NAME + "_scale_inv": torch.ones(3, 2)}, FP8 | {"weight_block_size": [0, 8]}, "config.json says that blocks of scales have the size [0, 8], which is no size: correct it"),
    "a block of text": ({NAME: CODES, NAME + "_scale_inv": torch.ones(3, 2)}, FP8 | {"weight_block_size": "16x8"}, "have the size '16x8'"),
    "a group of no size": ({NAME: CODES, NAME + "_scale": torch.ones(33, 5)}, groups(strategy="group"), "have the size [1, None]"),
}  # fmt: skip


def with_scale(value: float) -> Tensors:
    codes, scales = fp8(weights()[NAME], BLOCK)
    scales[2, 1] = value
    return {NAME: codes, NAME + "_scale_inv": scales}


def with_code(value: int) -> Tensors:
    codes, scales = fp8(weights()[NAME], BLOCK)
    codes.view(torch.uint8)[32, 9] = value
    return {NAME: codes, NAME + "_scale_inv": scales}


BY_VALUES: dict[str, tuple[Tensors, str]] = {
    "a scale of 0": (with_scale(0.0), f"{NAME}_scale_inv holds 0.0 in sft, and a scale is a finite number above 0: it is damaged, download it again"),
    "a scale below 0": (with_scale(-1.0), "holds -1.0 in sft"),
    "a scale that is no number": (with_scale(float("nan")), "holds nan in sft"),
    "a scale without end": (with_scale(float("inf")), "holds inf in sft"),
    "a code that is no number": (with_code(0x7F), f"{NAME} holds NaN or Inf in the SFT model: it is damaged"),
    "a product without end": (with_scale(3e38), f"{NAME} holds NaN or Inf in the SFT model"),
}  # fmt: skip


def refused(tmp_path: Path, expo: Expo, tensors: Tensors, section: dict | None) -> str:
    """The one line that extrapolating from these tensors ends with."""
    others = {name: t for name, t in weights().items() if name != NAME}
    write_quantized(tmp_path / "sft", others | tensors, section)
    write_checkpoint(tmp_path / "aligned", weights())
    ran = expo("extrapolate", tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", "--alpha", 1.5, "-q")  # fmt: skip
    assert ran.code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "sft"]
    (line,) = ran.err.splitlines()
    return line


@pytest.mark.parametrize("name", BY_HEADERS)
def test_by_headers(name: str, tmp_path: Path, expo: Expo) -> None:
    tensors, section, message = BY_HEADERS[name]
    assert message in refused(tmp_path, expo, tensors, section)


@pytest.mark.parametrize("name", BY_VALUES)
def test_by_values(name: str, tmp_path: Path, expo: Expo) -> None:
    tensors, message = BY_VALUES[name]
    assert message in refused(tmp_path, expo, tensors, SECTION)


def test_a_power_that_is_no_number(tmp_path: Path, expo: Expo) -> None:
    powers = POWERS.clone()
    powers[1, 2, 1] = 255
    for side in ("sft", "aligned"):
        stored = {EXPERTS + "_blocks": BLOCKS, EXPERTS + "_scales": powers}
        write_quantized(tmp_path / side, stored, None)
    ran = expo("extrapolate", tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", "--alpha", 1.5, "-q")  # fmt: skip
    assert f"{EXPERTS}_scales holds nan in" in ran.err
    assert ran.code == 1


def test_a_scale_in_a_file_that_the_index_does_not_name(tmp_path: Path, expo: Expo) -> None:
    folder = write_quantized(tmp_path / "sft", quantized(weights(), BLOCK), SECTION, shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    kept = {n: f for n, f in index["weight_map"].items() if not n.endswith("_scale_inv")}
    path.write_text(json.dumps(index | {"weight_map": kept}))
    ran = expo("plan", folder, folder)
    assert ran.code == 1
    assert "_scale_inv and no" in ran.err


def test_empty_tensors_and_single_numbers(tmp_path: Path) -> None:
    f8 = torch.float8_e4m3fn
    stored = {"a.weight": torch.zeros(0, 8).to(f8), "a.weight_scale": torch.ones(1), "b": torch.tensor(2.0).to(f8),
              "b_scale": torch.tensor(0.5), "c": torch.zeros(0, 4).to(f8), "c_scale": torch.ones(0, 1),
              "e_blocks": torch.zeros(0, 3, 2, 16, dtype=torch.uint8), "e_scales": torch.zeros(0, 3, 2, dtype=torch.uint8)}  # fmt: skip
    for side in ("sft", "aligned"):
        write_quantized(tmp_path / side, stored, None)
    made = dict(door.apply(stored, stored, alpha=1.5))
    assert {name: (*t.shape,) for name, t in made.items()} == {"a.weight": (0, 8), "b": (), "c": (0, 4), "e": (0, 64, 3)}  # fmt: skip
    assert made["b"] == 1.0


def test_an_adapter_in_codes(tmp_path: Path, expo: Expo) -> None:
    write_checkpoint(tmp_path / "base", weights())
    (tmp_path / "lora").mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(said))
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, 10), f"{prefix}.lora_B.weight": torch.ones(33, 2)}  # fmt: skip
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in factors.items()}, tmp_path / "lora" / "adapter_model.safetensors")  # fmt: skip
    ran = expo("plan", tmp_path / "base", f"{tmp_path}/base+{tmp_path}/lora")
    assert ran.code == 1
    assert "adapter lora stores base_model.model.model.layers.0.mlp.up_proj.lora_A.weight as F8_E4M3, which expo cannot add" in ran.err  # fmt: skip
