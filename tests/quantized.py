"""Quantized checkpoints for tests, coded by a few lines of torch, and what they stand for."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .conftest import CONFIG, Tensors

Block = tuple[int, int]

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(weight: Tensor, block: Block, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix: the largest of every block becomes 448."""
    rows, columns = weight.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    codes, scales = torch.empty(rows, columns), torch.empty(high, wide)
    for i in range(high):
        for j in range(wide):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            largest = weight[part].float().abs().max().clamp(min=1e-12)
            scale = (largest / 448).to(dtype)
            if dtype == torch.float8_e8m0fnu:  # rounded up: nothing overflows
                scale = torch.exp2(torch.log2(largest / 448).ceil()).to(dtype)
            scales[i, j] = scale.float()
            codes[part] = weight[part].float() / scale.float()
    return codes.to(torch.float8_e4m3fn), scales.to(dtype)


def numbers(codes: Tensor, scales: Tensor, block: Block) -> Tensor:
    """What codes stand for: the product in float64, rounded to float32 as one multiplication is."""
    spread = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    rows, columns = codes.shape
    return (codes.double() * spread[:rows, :columns]).float()


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [E, R, G, 16] and scales [E, R, G] of experts [E, R, 32·G]."""
    experts, rows, columns = weight.shape
    groups = weight.float().reshape(experts, rows, columns // 32, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    nearest = (scaled.abs()[..., None] - _NUMBERS).abs().argmin(-1)
    code = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return code[..., 0::2] | code[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """What `mxfp4` stands for: float32 [E, 32·G, R]."""
    code = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()  # [E, R, G, 32]
    size = _NUMBERS[code & 7] * torch.exp2(scales.double() - 127)[..., None]
    return torch.where(code > 7, -size, size).float().flatten(2).transpose(1, 2).contiguous()


def quantized(tensors: Tensors, block: Block, *, suffix: str = "_scale_inv") -> Tensors:
    """The tensors with every projection in FP8, scales last."""
    made, scales = {}, {}
    for name, tensor in tensors.items():
        if "proj" in name:
            made[name], scales[name + suffix] = fp8(tensor, block)
        else:
            made[name] = tensor
    return made | scales


def plain(tensors: Tensors, block: Block, *, suffix: str = "_scale_inv") -> Tensors:
    """What `quantized` tensors stand for."""
    return {
        name: numbers(t, tensors[name + suffix], block) if name + suffix in tensors else t
        for name, t in tensors.items()
        if not name.endswith(suffix)
    }


def write_quantized(
    folder: Path, tensors: Tensors, section: dict | None, *, shards: int = 1, config: dict = CONFIG
) -> Path:
    """Save a quantized model; the last of several shards holds all scales."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {} if section is None else {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config | said))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [name for name in tensors if "_scale" not in name]
    size = math.ceil(len(names) / (shards - 1))
    parts = [names[at : at + size] for at in range(0, len(names), size)]
    parts.append([name for name in tensors if "_scale" in name])
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
