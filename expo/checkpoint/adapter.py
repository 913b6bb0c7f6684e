"""A PEFT LoRA adapter as a change to a base checkpoint: θ = W + s·B·A (arXiv 2106.09685)."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from expo.checkpoint.child import search
from expo.checkpoint.dtypes import COPIED, FLOATS
from expo.checkpoint.files import Files, read_json
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.checkpoint.parsing import shown
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


def read_adapter(files: Files, shard: Shard, base: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Resolve the adapter's keys against the tensors of its base, whose shapes are given.

    Raises:
        CheckpointError: not a plain LoRA adapter, or it does not fit this base.
    """
    config = read_config(files)
    updates: dict[str, LowRank] = {}
    replaced: dict[str, TensorInfo] = {}
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    parts = {key: _split(key) for key in tensors}
    alphas = _alphas(files.label, config, {module for module, _ in parts.values()})
    for key, tensor in tensors.items():
        module, kind = parts[key]
        if tensor.dtype not in FLOATS | COPIED:
            _refuse(
                files.label, f"stores {printable(key)} as {tensor.dtype}, which expo cannot add"
            )
        match kind:
            case "lora_A.weight" | "lora_embedding_A":
                partner = tensors.get(key.replace("_A", "_B"))
                if partner is None:
                    _refuse(files.label, f"has {printable(key)} without its B matrix")
                name = f"{module}.weight"
                embedding = kind == "lora_embedding_A"
                transposed = embedding or bool(config.get("fan_in_fan_out"))
                rank = _checked_rank(files.label, key, tensor)
                scale = alphas[module] / (math.sqrt(rank) if config.get("use_rslora") else rank)
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


def _alphas(label: str, config: dict, modules: Iterable[str]) -> dict[str, float]:
    """What every module's product is multiplied with before it is divided by r, or √r with rsLoRA (2312.03732).

    The first pattern that fits a name's end counts, as in PEFT.
    """
    alphas = dict.fromkeys(modules, float(config["lora_alpha"]))
    patterns = config.get("alpha_pattern") or {}
    if not patterns:
        return alphas
    try:
        found = search([rf"\A(.*\.)?({pattern})$" for pattern in patterns], list(alphas))
    except ValueError as error:
        _refuse(label, f"has an alpha_pattern that cannot be used: {error}")
    for fitting, alpha in reversed([*zip(found, patterns.values(), strict=True)]):
        alphas |= dict.fromkeys(fitting, float(alpha))
    return alphas


def _checked_rank(label: str, key: str, a: TensorInfo) -> int:
    if len(a.shape) != 2 or a.shape[0] == 0:
        _refuse(
            label, f"has {printable(key)} of the shape {shown(list(a.shape))}, no matrix of a rank"
        )
    return a.shape[0]


def _check_config(label: str, config: dict) -> None:
    if config.get("peft_type") != "LORA":
        _refuse(
            label, f"is a {_named(config.get('peft_type'))} adapter; expo adds LoRA adapters only"
        )
    for key, meaning in _UNSUPPORTED.items():
        if config.get(key):
            _refuse(
                label,
                f"uses {meaning} ({key}), which expo cannot add; "
                "merge it with peft's merge_and_unload first",
            )
    if not _is_number(config.get("lora_alpha")):
        _refuse(label, f"has no number for lora_alpha, but {shown(config.get('lora_alpha'))}")
    patterns = config.get("alpha_pattern") or {}
    if not (isinstance(patterns, dict) and all(map(_is_number, patterns.values()))):
        _refuse(label, f"has an alpha_pattern that is no map to numbers: {shown(patterns)}")


def _named(value: object) -> str:
    return printable(value) if isinstance(value, str) else shown(value)


def _is_number(value: object) -> bool:
    """Whether a float holds it."""
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:
        return False


def _check_fit(label: str, name: str, update: LowRank, base: Mapping[str, tuple[int, ...]]) -> None:
    if name not in base:
        _refuse(label, f"adapts {printable(name)}, which the base lacks: is it the right base?")
    if len(update.a.shape) != 2 or len(update.b.shape) != 2:
        _refuse(label, f"adapts {printable(name)} with matrices that are not two-dimensional")
    if update.a.shape[0] != update.b.shape[1] or update.shape != base[name]:
        _refuse(
            label,
            f"adapts {printable(name)} as {list(update.shape)}, "
            f"the base has {list(base[name])}: is it the right base?",
        )


def _refuse(label: str, fault: str) -> NoReturn:
    raise CheckpointError(f"adapter {label} {fault}")
