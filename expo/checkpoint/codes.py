"""How the elements of a quantized weight lie in its file: as codes, blocks of which share a scale."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from expo.checkpoint.headers import TensorInfo, printable
from expo.checkpoint.parsing import shown
from expo.errors import CheckpointError
from expo.operators.codes import e8m0

if TYPE_CHECKING:
    from torch import Tensor

    from expo.checkpoint.reader import Bytes, Reader

Format = Literal["fp8", "mxfp4"]
Scales = NDArray[np.float32]
Places = NDArray[np.int64]

_POWERS = ("F8_E8M0", "U8")
SCALE_DTYPES: dict[Format, tuple[str, ...]] = {
    "fp8": ("F32", "BF16", "F16", *_POWERS),
    "mxfp4": _POWERS,
}
"""What scales are stored as; bytes are exponents."""

_ZEROS = {"fp8": b"\x00\x80", "mxfp4": b"\x00\x08\x80\x88"}
MXFP4_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Codes:
    """A stack of matrices of `rows` × `columns` codes, a scale for every `block` (rows, columns) of each.

    "fp8" is a byte (E4M3) an element, which lies where the element does. "mxfp4" is four bits, and the weight is
    the transpose of every matrix. `scale` holds ⌈rows/b₀⌉ × ⌈columns/b₁⌉ numbers a matrix.
    """

    format: Format
    scale: TensorInfo
    rows: int
    columns: int
    block: tuple[int, int]

    @property
    def scales_each(self) -> int:
        """Scales a matrix."""
        return -(-self.rows // self.block[0]) * -(-self.columns // self.block[1])

    @property
    def codes_each(self) -> int:
        """Codes a byte."""
        return 1 if self.format == "fp8" else 2

    @property
    def whole_bytes(self) -> int:
        """What one element takes to decode, where that is a whole matrix of codes."""
        return self.rows * self.columns // 2 if self.format == "mxfp4" else 0

    @property
    def held_bytes(self) -> int:
        """What whoever decodes holds of a matrix: its scales as float32, and what one element takes."""
        return self.whole_bytes + 4 * self.scales_each

    @property
    def zeros(self) -> bytes:
        """The bytes that hold nothing but ±0."""
        return _ZEROS[self.format]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the weight whose codes have the shape `stored`."""
        return stored if self.format == "fp8" else (stored[0], self.columns, self.rows)

    def span(self, begin: int, count: int) -> tuple[int, int]:
        """Where the codes of elements begin … lie: (their first byte in the stored tensor, how many)."""
        if self.format == "fp8":
            return begin, count
        first, last = self._matrices(begin, count)
        return first * self.whole_bytes, (last - first) * self.whole_bytes

    def scale_span(self, begin: int, count: int) -> tuple[int, int]:
        """The scales of the matrices that hold elements begin …: (the first of them, how many)."""
        first, last = self._matrices(begin, count)
        return first * self.scales_each, (last - first) * self.scales_each

    def places(self, elements: Places) -> tuple[Places, Places]:
        """Of every element: which code of the stored tensor it is, and which scale is its."""
        if self.format == "fp8":
            line, column = elements // self.columns, elements % self.columns
            matrix, row = line // self.rows, line % self.rows
        else:
            line, row = elements // self.rows, elements % self.rows
            matrix, column = line // self.columns, line % self.columns
        blocks = -(-self.columns // self.block[1])
        scale = matrix * self.scales_each + row // self.block[0] * blocks + column // self.block[1]
        return (matrix * self.rows + row) * self.columns + column, scale

    def within(self, begin: int) -> int:
        """An element, counted from the first of its matrix."""
        return begin % (self.rows * self.columns)

    def _matrices(self, begin: int, count: int) -> tuple[int, int]:
        size = max(self.rows * self.columns, 1)
        return begin // size, -(-(begin + count) // size)

    def values(self, codes: "Bytes", scales: Scales, first: int, count: int) -> "Tensor":
        """Elements first …, counted from the first matrix that `scales` are of, as float32 [count].

        Args:
            codes: those of the elements; of "mxfp4" all of these matrices.
        """
        import torch

        from expo.operators.dequantize import dequantize_fp8, dequantize_mxfp4

        torch_codes, torch_scales = torch.from_numpy(codes), torch.from_numpy(scales)
        if self.format == "fp8":
            return dequantize_fp8(
                torch_codes,
                torch_scales,
                first,
                rows=self.rows,
                columns=self.columns,
                block=self.block,
            )
        packed = torch_codes.view(-1, self.rows, self.columns // 2)
        each = torch_scales.view(-1, self.rows, self.columns // MXFP4_BLOCK)
        return dequantize_mxfp4(packed, each, first, count)


def scale_numbers(raw: "Bytes", dtype: str) -> Scales:
    """Stored scales as float32, exactly. Bytes are exponents: 2^(b − 127)."""
    match dtype:
        case "F32":
            return raw.view(np.float32)
        case "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return raw.view(np.float16).astype(np.float32)
        case _:
            return np.take(e8m0(), raw)


def read_scales(codes: Codes, span: tuple[int, int], reader: "Reader", label: str) -> Scales:
    """The scales of a span, (the first, how many), as float32.

    Args:
        reader: of the file that holds them.
        label: of the model, for messages.

    Raises:
        CheckpointError: they cannot be read, or one is no finite number above 0, which no quantizer writes.
    """
    info, (first, count) = codes.scale, span
    stored = np.empty(count * info.item_bytes, np.uint8)
    reader.copy(info.begin + first * info.item_bytes, stored)
    scales = scale_numbers(stored, info.dtype)
    good = np.isfinite(scales) & (scales > 0)
    if not good.all():
        bad = float(scales[~good][0])
        raise CheckpointError(
            f"{printable(info.name)} holds {shown(bad)} in {label}, and a scale is a finite number above 0: it is "
            "damaged, download it again"
        )
    return scales
