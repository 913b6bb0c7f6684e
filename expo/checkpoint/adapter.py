"""A PEFT LoRA adapter as a change to a base checkpoint: θ = W + s·B·A (arXiv 2106.09685)."""

import math
import re
from dataclasses import dataclass
from typing import NoReturn

from expo.checkpoint.files import Files, read_json
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that an adapter is for."""
_UNSUPPORTED = {
    "use_dora": "DoRA magnitudes",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable token deltas",
    "lora_bias": "a bias inside LoRA",
    "alora_invocation_tokens": "activated LoRA",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """s·B·A with A of shape (r, in) and B of shape (out, r); `transposed` adds its transpose."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base, by the base tensor's name; `base` is what it was made for, as its
    configuration says."""

    files: Files
    shard: Shard
    updates: dict[str, LowRank]
    replaced: dict[str, TensorInfo]
    base: str = ""


def read_adapter(files: Files, shard: Shard, base: dict[str, TensorInfo]) -> Adapter:
    """Resolve the adapter's keys against the tensors of its base.

    Raises:
        CheckpointError: not a plain LoRA adapter, or it does not fit this base.
    """
    config = read_config(files)
    updates: dict[str, LowRank] = {}
    replaced: dict[str, TensorInfo] = {}
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    for key, tensor in tensors.items():
        module, kind = _split(key)
        match kind:
            case "lora_A.weight" | "lora_embedding_A":
                partner = tensors.get(key.replace("_A", "_B"))
                if partner is None:
                    _refuse(files.label, f"has {printable(key)} without its B matrix")
                name = f"{module}.weight"
                embedding = kind == "lora_embedding_A"
                transposed = embedding or bool(config.get("fan_in_fan_out"))
                scale = _scale(config, module, rank=tensor.shape[0])
                updates[name] = LowRank(tensor, partner, scale, transposed)
                _check_fit(files.label, name, updates[name], base)
            case "lora_B.weight" | "lora_embedding_B":
                pass
            case "whole":
                if module not in base:
                    _refuse(files.label, f"replaces {printable(module)}, which the base lacks")
                replaced[module] = tensor
            case _:
                _refuse(files.label, f"holds {printable(key)}, which expo does not know")
    return Adapter(
        files, shard, updates, replaced, str(config.get("base_model_name_or_path") or "")
    )


def read_config(files: Files) -> dict:
    """The configuration of a plain LoRA adapter.

    Raises:
        CheckpointError: it is none, or one that expo cannot add.
    """
    config = read_json(files, CONFIG)
    _check_config(files.label, config)
    return config


def _split(key: str) -> tuple[str, str]:
    if not key.startswith(PREFIX):
        return key, "unknown"
    name = key.removeprefix(PREFIX)
    # PEFT saves the base of an adapted embedding beside the adapter, under the wrapper's name.
    name = name.replace(".base_layer.", ".")
    if found := re.fullmatch(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])", name):
        return found[1], found[2]
    return (name, "unknown") if ".lora_" in name else (name, "whole")


def _scale(config: dict, module: str, rank: int) -> float:
    """lora_alpha / r, or / √r with rsLoRA (2312.03732); patterns match as PEFT's do."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_config(label: str, config: dict) -> None:
    if config.get("peft_type") != "LORA":
        _refuse(label, f"is a {config.get('peft_type')} adapter; expo adds LoRA adapters only")
    for key, meaning in _UNSUPPORTED.items():
        if config.get(key):
            _refuse(
                label,
                f"uses {meaning} ({key}), which expo cannot add; "
                "merge it with peft's merge_and_unload first",
            )
    if not isinstance(config.get("lora_alpha"), int | float):
        _refuse(label, "has no lora_alpha")


def _check_fit(label: str, name: str, update: LowRank, base: dict[str, TensorInfo]) -> None:
    if name not in base:
        _refuse(label, f"adapts {printable(name)}, which the base lacks: is it the right base?")
    if len(update.a.shape) != 2 or len(update.b.shape) != 2:
        _refuse(label, f"adapts {printable(name)} with matrices that are not two-dimensional")
    if update.a.shape[0] != update.b.shape[1] or update.shape != base[name].shape:
        _refuse(
            label,
            f"adapts {printable(name)} as {list(update.shape)}, "
            f"the base has {list(base[name].shape)}: is it the right base?",
        )


def _refuse(label: str, fault: str) -> NoReturn:
    raise CheckpointError(f"adapter {label} {fault}")
