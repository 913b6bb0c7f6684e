"""The matrices of a model, one by one: what layers multiply by, fused and stacked ones taken apart."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.child import search
from expo.checkpoint.dtypes import FLOATS
from expo.checkpoint.names import is_of_kind
from expo.checkpoint.weight import Weight
from expo.errors import SpecError

_GATE = re.compile(r"(block_sparse_moe\.gate|mlp\.gate|router(\.\w+)?|shared_expert_gate)\.weight$")
_FUSED_QKV = re.compile(r"\.(qkv_proj|Wqkv|c_attn)\.weight$")  # query_key_value is interleaved
_FUSED_GATE_UP = re.compile(r"\.gate_up_proj(\.weight)?$")


@dataclass(frozen=True)
class Matrix:
    """Rows [first, end) of a tensor, or of one expert of a stack of them."""

    label: str
    tensor: str
    weight: Weight
    first: int
    end: int
    expert: int | None = None

    @property
    def begin(self) -> int:
        """Its first element, counted from the start of the tensor."""
        *_, rows, columns = self.weight.shape
        return ((self.expert or 0) * rows + self.first) * columns

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.first, self.weight.shape[-1]


def matrices(checkpoint: Checkpoint, pattern: str | None = None) -> Iterator[Matrix]:
    """Every matrix of the layers, in the order of the files.

    Embeddings, head, norms, biases and router gates are left out, unless a `pattern` (`re.search` on
    the label, which starts with the full name) asks for them. What is in a fused tensor is told apart
    by rows: `qkv_proj.weight:v`; the experts of a stack by number: `gate_up_proj[3]:up`. Only transformers stacks
    experts: elsewhere three dimensions are a convolution.

    Raises:
        SpecError: the pattern is no regular expression, or does not come to an end.
    """
    found = _all_parts(checkpoint, pattern)
    if pattern is None:
        yield from found
        return
    listed = list(found)
    try:
        chosen = search([pattern], [matrix.label for matrix in listed])[0]
    except ValueError as error:
        raise SpecError(f"target: {error}") from error
    yield from (matrix for matrix in listed if matrix.label in chosen)


def _all_parts(checkpoint: Checkpoint, pattern: str | None) -> Iterator[Matrix]:
    dimensions = (2, 3) if checkpoint.is_of_transformers else (2,)
    for name, weight in checkpoint.weights.items():
        if (
            weight.dtype not in FLOATS
            or len(weight.shape) not in dimensions
            or min(weight.shape) < 2
        ):
            continue
        if pattern is None and (
            is_of_kind(name, ("embeddings", "head", "norms", "biases")) or is_router_gate(name)
        ):
            continue
        yield from _parts(checkpoint, name, weight)


def is_router_gate(name: str) -> bool:
    """Whether a tensor chooses experts."""
    return bool(_GATE.search(name))


def _parts(checkpoint: Checkpoint, name: str, weight: Weight) -> Iterator[Matrix]:
    experts = range(weight.shape[0]) if len(weight.shape) == 3 else [None]
    for expert in experts:
        stem = name if expert is None else f"{name}[{expert}]"
        for part, first, end in _rows(checkpoint.config, name, weight.shape[-2]):
            yield Matrix(stem + part, name, weight, first, end, expert)


def _rows(config: dict, name: str, rows: int) -> list[tuple[str, int, int]]:
    """Which rows belong together: (suffix of the label, first, end)."""
    wide = (config.get("intermediate_size"), config.get("moe_intermediate_size"))
    if _FUSED_GATE_UP.search(name) and rows % 2 == 0 and rows // 2 in wide:
        return [(":gate", 0, rows // 2), (":up", rows // 2, rows)]
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if _FUSED_QKV.search(name) and isinstance(heads, int) and heads > 0:
        groups = groups if isinstance(groups, int) and groups > 0 else heads
        size = rows // (heads + 2 * groups)
        q, k = heads * size, (heads + groups) * size
        if (heads + 2 * groups) * size == rows:
            return [(":q", 0, q), (":k", q, k), (":v", k, rows)]
    return [("", 0, rows)]
