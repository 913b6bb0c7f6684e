"""Which tensors of a quantized model are codes, which are their scales, and which models cannot be read.

The tensors decide. What config.json says adds the size of blocks, which a number of blocks does not tell where the last
ones are cut short; where the two contradict each other the model is refused.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from expo.checkpoint.codes import MXFP4_BLOCK, SCALE_DTYPES, Codes, Format
from expo.checkpoint.dtypes import FLOATS
from expo.checkpoint.headers import Shard, TensorInfo, printable
from expo.checkpoint.parsing import shown
from expo.errors import CheckpointError

_KEYS = ("quantization_config", "compression_config")
_READ = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")
"""What `quant_method` may say."""

_SCALES = ("_scale_inv", "_scale")
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"
_OF_ACTIVATIONS = re.compile(r"(?P<of>.+)[._](input|activation|output)_scale$")
_OF_THE_CACHE = re.compile(r"(?P<of>.+)\.[qkv]_scale$")
_LEFT = re.compile(
    r"\.(qweight|qzeros|quant_map|quant_state\..*|SCB|weight_scale|weight_scale_inv|weight_packed"
    r"|weight_zero_point|weight_g_idx)$"
)
_PERHAPS = re.compile(r"\.(scales|g_idx|absmax)$|_(blocks|scales)$")
"""What parameters of plain models may be called as well."""
_CURE = "name the unquantized original, or dequantize it first (model.dequantize() in transformers)"

Block = tuple[int, int]


@dataclass(frozen=True)
class Coding:
    """What of a model's stored tensors are `codes`, by the name of the tensor that holds them; `beside` lie their
    scales and those of activations. Nothing where the model is not quantized."""

    codes: Mapping[str, Codes] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def name(self, stored: str) -> str:
        """What the weight is called whose stored tensor this is."""
        found = self.codes.get(stored)
        is_blocks = found is not None and found.format == "mxfp4"
        return stored.removesuffix(_BLOCKS) if is_blocks else stored


def coding(label: str, shards: Iterable[Shard], config: dict) -> Coding:
    """Find the codes of a model by its headers.

    Raises:
        CheckpointError: it is quantized in another way than in FP8 with scales or in MXFP4, a scale is missing or
            does not fit, or config.json says something else than the tensors.
    """
    stored = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    said = _said(label, config)
    stated = None if said is None else _stated(label, said)
    finder = _Finder(label, stored, stated)
    codes = dict(finder.found())
    beside = {made.scale.name for made in codes.values()}
    beside |= {name for name in stored if _is_of_activations(name, codes)} - codes.keys()
    finder.refuse_others(codes.keys() | beside, is_said=said is not None)
    if said is not None and not codes:
        raise CheckpointError(
            f"{label}: config.json says that it is quantized ({_method(said)}), and no tensor holds codes: if its "
            f"weights are plain, remove {' and '.join(_KEYS)} from config.json, else download it again"
        )
    return Coding(codes, frozenset(beside), _notes(label, codes, len(beside) - len(codes)))


def coded_among(tensors: Iterable[TensorInfo], *, is_said: bool) -> list[TensorInfo]:
    """The tensors of a model that look like codes or scales, of whatever kind.

    Args:
        is_said: whether config.json speaks of codes. Where it does not, and no tensor is of codes for sure, one that is
            only called as scales are is a parameter like any other.
    """
    found = [t for t in tensors if _is_sure(t) or _PERHAPS.search(t.name)]
    return found if is_said or any(map(_is_sure, found)) else []


def _is_sure(tensor: TensorInfo) -> bool:
    is_integer = tensor.dtype not in FLOATS and bool(_PERHAPS.search(tensor.name))
    return tensor.dtype.startswith("F8_") or bool(_LEFT.search(tensor.name)) or is_integer


def is_quantized(config: dict) -> bool:
    """Whether a configuration speaks of codes."""
    return _section(config) is not None


def without_quantization(config: dict) -> dict:
    """A configuration without what says how the model's weights are coded."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _said(label: str, config: dict) -> dict | None:
    """What config.json says of the codes, if anything."""
    found = _section(config)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("quant_method") not in _READ:
        _refuse(label, _method(found))
    if found.get("transform_config"):
        _refuse(label, f"{_method(found)} with a transform of its weights")
    return found


def _section(config: dict) -> object:
    """What says how weights are coded; of a model of several parts any of them."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part[key] for part in parts for key in _KEYS if part.get(key)), None)


def _method(said: object) -> str:
    method = said.get("quant_method", "unknown") if isinstance(said, dict) else "unknown"
    return printable(str(method))


def _stated(label: str, said: dict) -> list[Block] | None:
    """The blocks that config.json states, 0 for all of a direction; None where it states none."""
    if said["quant_method"] == "fp8" and said.get("weight_block_size") is not None:
        return [_block(label, said["weight_block_size"])]
    groups = said.get("config_groups")
    if said["quant_method"] != "compressed-tensors" or not isinstance(groups, dict):
        return None
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    blocks = [_of_group(label, one) for one in weights if isinstance(one, dict)]
    return None if None in blocks or not blocks else [block for block in blocks if block]


def _of_group(label: str, weights: dict) -> Block | None:
    match weights.get("strategy"):
        case "tensor":
            return 0, 0
        case "channel":
            return 1, 0
        case "group":
            return _block(label, [1, weights.get("group_size")])
        case "block":
            return _block(label, weights.get("block_structure"))
        case _:
            return None


def _block(label: str, said: object) -> Block:
    match said:
        case [int(rows), int(columns)] if 0 < rows < 1 << 31 and 0 < columns < 1 << 31:
            return rows, columns
    raise CheckpointError(
        f"{label}: config.json says that blocks of scales have the size {shown(said)}, which is no size: correct it"
    )


class _Finder:
    """Looks for codes among the stored tensors of one model."""

    def __init__(
        self, label: str, stored: Mapping[str, TensorInfo], stated: list[Block] | None
    ) -> None:
        self._label, self._stored, self._stated = label, stored, stated

    def found(self) -> Iterator[tuple[str, Codes]]:
        for name, tensor in self._stored.items():
            if tensor.dtype == "F8_E4M3" and (scale := self._scale_of(name)):
                yield name, self._fp8(tensor, scale)
            elif tensor.dtype == "U8" and name.endswith(_BLOCKS):
                scale = self._stored.get(name.removesuffix(_BLOCKS) + _BLOCK_SCALES)
                if scale is not None:
                    yield name, self._mxfp4(tensor, scale)

    def refuse_others(self, known: Collection[str], *, is_said: bool) -> None:
        """Refuse what looks like codes or scales and is neither, codes first."""
        left = (tensor for name, tensor in self._stored.items() if name not in known)
        strange = coded_among(left, is_said=is_said or bool(known))
        for tensor in sorted(strange, key=lambda tensor: not tensor.dtype.startswith("F8_")):
            what = f"{printable(tensor.name)} is {tensor.dtype}"
            _refuse(self._label, what, _why_not(tensor))

    def _scale_of(self, name: str) -> TensorInfo | None:
        """The tensor that holds the scales of another."""
        there = [self._stored[name + end] for end in _SCALES if name + end in self._stored]
        if len(there) > 1:
            both = f"{printable(there[0].name)} and {printable(there[1].name)}"
            _refuse(self._label, f"{both} are both there", "one of them is its scale")
        return there[0] if there else None

    def _fp8(self, tensor: TensorInfo, scale: TensorInfo) -> Codes:
        self._check_dtype("fp8", scale)
        *stack, rows, columns = (1, 1, *tensor.shape)[-max(2, len(tensor.shape)) :]
        if scale.count == 1:
            rows, grid = rows * math.prod(stack), (1, 1)
        elif [*scale.shape[:-2]] == [*tensor.shape[:-2]] and len(scale.shape) == len(tensor.shape):
            grid = scale.shape[-2:]
        else:
            self._misfit(tensor, scale)
        least = int(scale.count == 1)  # an empty tensor has one scale too
        for high, wide in self._stated or _likely(rows, columns, grid):
            block = high or max(rows, 1), wide or max(columns, 1)
            if grid == (max(-(-rows // block[0]), least), max(-(-columns // block[1]), least)):
                return Codes("fp8", scale, rows, columns, block)
        self._misfit(tensor, scale)

    def _mxfp4(self, tensor: TensorInfo, scale: TensorInfo) -> Codes:
        self._check_dtype("mxfp4", scale)
        name = tensor.name.removesuffix(_BLOCKS)
        if name in self._stored:
            both = f"{printable(name)} and {printable(tensor.name)}"
            _refuse(self._label, f"{both} are both there", "one of them is the weight")
        if len(tensor.shape) != 4 or tensor.shape[3:] != (16,) or tensor.shape[:3] != scale.shape:
            self._misfit(tensor, scale)
        _, rows, groups, _ = tensor.shape
        return Codes("mxfp4", scale, rows, groups * MXFP4_BLOCK, (1, MXFP4_BLOCK))

    def _check_dtype(self, of: Format, scale: TensorInfo) -> None:
        if scale.dtype not in SCALE_DTYPES[of]:
            what = f"{printable(scale.name)} is {scale.dtype}"
            _refuse(
                self._label, what, f"the scales of such codes are {', '.join(SCALE_DTYPES[of])}"
            )

    def _misfit(self, tensor: TensorInfo, scale: TensorInfo) -> NoReturn:
        shapes = f"{shown(list(scale.shape))} for {printable(tensor.name)} of {shown(list(tensor.shape))}"
        stated, cure = "", "download the model again"
        rows = [*tensor.shape[:-1], 1]
        if tensor.dtype == "F8_E4M3" and len(scale.shape) != len(tensor.shape):
            cure = f"a scale a row has the shape {shown(rows)}"
        elif tensor.dtype == "F8_E4M3" and self._stated:
            stated = f", and config.json says a scale {' or '.join(map(_words, self._stated))}"
        elif tensor.dtype == "F8_E4M3":
            cure = "a size of blocks that is no power of two has to stand in config.json (weight_block_size)"
        raise CheckpointError(
            f"{self._label} is quantized, and {printable(scale.name)} is {shapes}{stated}: these do not fit each "
            f"other; {cure}"
        )


def _is_of_activations(name: str, codes: Mapping[str, Codes]) -> bool:
    """Whether a tensor holds the scale of what goes into or comes out of coded weights, or of the cache of keys and
    values beside them. Parameters of plain modules are called so, too."""
    if found := _OF_ACTIVATIONS.fullmatch(name):
        return found["of"] in codes or f"{found['of']}.weight" in codes
    found = _OF_THE_CACHE.fullmatch(name)
    return found is not None and any(code.startswith(f"{found['of']}.") for code in codes)


def _why_not(tensor: TensorInfo) -> str:
    """Why a tensor that looks like codes or scales is neither."""
    name = printable(tensor.name)
    if tensor.name.endswith(".weight_g_idx"):
        return "its columns are in groups of another order (actorder)"
    if tensor.name.endswith((*_SCALES, _BLOCK_SCALES)):
        return "no codes that it could be the scale of are beside it"
    if tensor.dtype == "F8_E4M3":
        return f"there is no {name}{_SCALES[0]} and no {name}{_SCALES[1]} beside it"
    if tensor.dtype == "U8" and tensor.name.endswith(_BLOCKS):
        return f"there is no {name.removesuffix(_BLOCKS)}{_BLOCK_SCALES} beside it"
    return ""


def _likely(rows: int, columns: int, grid: tuple[int, ...]) -> list[Block]:
    """The blocks of a grid that nobody has stated: all of a direction, or the power of two that gives so many."""
    high, wide = _power(rows, grid[0]), _power(columns, grid[1])
    return [] if high is None or wide is None else [(high, wide)]


def _power(size: int, count: int) -> int | None:
    if count == 1 or size == 0:
        return 0
    powers = (1 << bits for bits in range(size.bit_length()))
    return next((power for power in powers if -(-size // power) == count), None)


def _words(block: Block) -> str:
    match block:
        case (0, 0):
            return "a tensor"
        case (1, 0):
            return "a row"
        case (rows, columns):
            return f"for {rows} × {columns}"


def _notes(label: str, codes: Mapping[str, Codes], others: int) -> tuple[str, ...]:
    """What is said of a model that is read from codes."""
    if not codes:
        return ()
    kinds = Counter(_kind(one) for one in codes.values())
    listed = "; ".join(f"{_tensors(count)} in {kind}" for kind, count in kinds.most_common(3))
    more = f" and {len(kinds) - 3} more forms" if len(kinds) > 3 else ""
    dropped = f"; {_tensors(others)} with scales of activations left out" if others else ""
    return (f"{label} is dequantized as it is read: {listed}{more}{dropped}",)


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _kind(codes: Codes) -> str:
    if codes.format == "mxfp4":
        return "MXFP4"
    match codes.block:
        case (rows, columns) if (rows, columns) == (codes.rows, codes.columns):
            return "FP8 (E4M3, a scale a tensor)"
        case (1, columns) if columns == codes.columns:
            return "FP8 (E4M3, a scale a row)"
        case (rows, columns):
            return f"FP8 (E4M3, a scale for {rows} × {columns})"


def _refuse(label: str, what: str, why: str = "") -> NoReturn:
    more = f", and {why}" if why else ", its codes cannot be added"
    raise CheckpointError(f"{label} is quantized ({what}){more}: {_CURE}")
