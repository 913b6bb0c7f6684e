"""Codes of quantized weights to float32, compiled: the bits of `operators.dequantize`."""

import numpy as np
from numpy import uint8, uint64
from numpy.typing import NDArray

from expo.compute.jit import compiled
from expo.operators.codes import e2m1, e4m3

_TILE = uint64(64)  # rows

Codes = NDArray[np.uint8]
Numbers = NDArray[np.float32]


def fp8(
    codes: Codes,
    scales: Numbers,
    first: int,
    rows: int,
    columns: int,
    block: tuple[int, int],
    *,
    out: Numbers,
) -> None:
    """See `dequantize_fp8`; elements `first` … as many as `out` has."""
    _fp8(codes, scales, first, rows, columns, block[0], block[1], e4m3(), out)


@compiled
def _fp8(codes, scales, first, rows, columns, high, wide, table, out):
    rows, columns, high, wide = uint64(rows), uint64(columns), uint64(high), uint64(wide)
    bands = (rows + high - uint64(1)) // high
    blocks = (columns + wide - uint64(1)) // wide
    count, done = uint64(len(out)), uint64(0)
    while done < count:
        at = uint64(first) + done
        line, column = at // columns, at % columns
        band = line // rows * bands + line % rows // high
        block = column // wide
        end = min(min((block + uint64(1)) * wide, columns) - column + done, count)
        scale = scales[band * blocks + block]
        for i in range(done, end):
            out[i] = table[codes[i]] * scale
        done = end


def mxfp4(
    codes: Codes, scales: Numbers, first: int, rows: int, columns: int, *, out: Numbers
) -> None:
    """See `dequantize_mxfp4`; elements `first` … as many as `out` has, of codes that are flat."""
    _mxfp4(codes, scales, first, rows, columns, e2m1(), out)


@compiled
def _mxfp4(codes, scales, first, rows, columns, table, out):
    rows, columns = uint64(rows), uint64(columns)
    half, blocks = columns // uint64(2), columns // uint64(32)
    count, done = uint64(len(out)), uint64(0)
    while done < count:
        at = uint64(first) + done
        line, row = at // rows, at % rows
        matrix, column = line // columns, line % columns
        whole = min((count - done) // rows, columns - column) // uint64(2) * uint64(2)
        if row or column % uint64(2) or not whole:
            shift = uint8(4) if column % uint64(2) else uint8(0)
            end = min(rows - row + done, count)
            code = (matrix * rows + row) * half + column // uint64(2)
            scale = (matrix * rows + row) * blocks + column // uint64(32)
            for i in range(done, end):
                out[i] = table[uint8(codes[code] >> shift) & uint8(15)] * scales[scale]
                code, scale = code + half, scale + blocks
            done = end
            continue
        # Some rows at a time, so that a line of codes is still in the innermost cache for the next columns.
        for top in range(uint64(0), rows, _TILE):
            bottom = min(top + _TILE, rows)
            for pair in range(uint64(0), whole, uint64(2)):
                code = (matrix * rows + top) * half + (column + pair) // uint64(2)
                scale = (matrix * rows + top) * blocks + (column + pair) // uint64(32)
                low = done + pair * rows
                high = low + rows
                for i in range(top, bottom):
                    both, size = codes[code], scales[scale]
                    out[low + i] = table[both & uint8(15)] * size
                    out[high + i] = table[both >> uint8(4)] * size
                    code, scale = code + half, scale + blocks
        done += whole * rows
