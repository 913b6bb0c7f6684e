"""Checks of a folder that holds a LoRA adapter."""

from collections.abc import Iterator

from expo.checkpoint.adapter import WEIGHTS, read_adapter, read_config
from expo.checkpoint.headers import printable
from expo.errors import CheckpointError
from expo.verification.check import Check, Skipped
from expo.verification.subject import Subject


def config(s: Subject) -> Iterator[str]:
    try:
        read_config(s.out)
    except CheckpointError as error:
        yield str(error)


def matrices(s: Subject) -> Iterator[str]:
    if not s.has(WEIGHTS):
        yield f"there is no {WEIGHTS}"
        return
    tensors = s.tensors
    for name, a in tensors.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            b = tensors.get(name.replace("_A", "_B"))
            if b is None:
                yield f"{printable(name)} has no B matrix"
            elif len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
                yield f"{printable(name)} is {list(a.shape)}, its B matrix {list(b.shape)}"
    if not any("lora_" in name for name in tensors):
        yield f"{WEIGHTS} holds no matrix of an adapter"


def base(s: Subject) -> Iterator[str]:
    if s.aligned is None:
        raise Skipped("no model to try it on: add --against, the model that it is for")
    if s.shard_faults or WEIGHTS not in s.shards:
        raise Skipped("the weight file cannot be read")
    model = {name: weight.shape for name, weight in s.aligned.weights.items()}
    try:
        read_adapter(s.out, s.shards[WEIGHTS], model)
    except CheckpointError as error:
        yield str(error)


CHECKS = (
    Check("adapter-config", "error", "it is a plain LoRA adapter", "make the adapter again", config),
    Check("adapter-matrices", "error", "every module has both matrices, of one rank", "make the adapter again", matrices),
    Check("adapter-base", "error", "it fits the model that it is for", "name that model with --against", base),
)  # fmt: skip
