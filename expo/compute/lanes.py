"""Sums of products in one order on every processor: sixteen lanes a row of 8,192 elements.

Element i of a row goes to lane i mod 16; the lanes of a row are added in order in float64, and so are
the rows. `operators.statistics.Summing` has the same order in numpy, and so the same bits.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import int64, uint64

from expo.compute.jit import inlined

LANES = uint64(16)
STRIP = uint64(512)  # elements a kernel works on at a time: they stay in the innermost cache
ROW = uint64(8192)


def products(*pairs: tuple[int, int]) -> Callable:
    """A kernel's function that adds ⟨scratch[i], scratch[j]⟩ of a strip for each pair (i, j), in the
    precision of both arrays.

    It is written for the compiler underneath: that leaves lanes in memory when they are a loop over an
    array, at three times the time, whereas a vector of sixteen stays in registers.
    """

    @intrinsic
    def add_products(typing, lanes, scratch, groups):
        def generate(context, builder, signature, arguments):
            lanes, scratch = (
                _Vectors(context, builder, array, value)
                for array, value in zip(signature.args[:2], arguments[:2], strict=True)
            )
            totals = [cgutils.alloca_once_value(builder, lanes.load(k)) for k in range(len(pairs))]
            with cgutils.for_range(builder, arguments[2]) as loop:
                strips = {i: scratch.load(i, loop.index) for pair in pairs for i in pair}
                for total, (i, j) in zip(totals, pairs, strict=True):
                    product = builder.fmul(strips[i], strips[j])
                    builder.store(builder.fadd(builder.load(total), product), total)
            for k, total in enumerate(totals):
                lanes.store(k, builder.load(total))
            return context.get_dummy_value()

        return types.void(lanes, scratch, groups), generate

    return add_products


class _Vectors:
    """A two-dimensional array as vectors of sixteen, while code is generated."""

    def __init__(self, context, builder, array, value) -> None:
        made = context.make_array(array)(context, builder, value)
        self._builder, self._data = builder, made.data
        item = ir.FloatType() if array.dtype == types.float32 else ir.DoubleType()
        self._vector = ir.VectorType(item, int(LANES)).as_pointer()
        self._width = cgutils.unpack_tuple(builder, made.shape)[1]

    def _at(self, row, group):
        number = self._width.type
        first = self._builder.mul(number(row), self._width)
        if group is not None:
            first = self._builder.add(first, self._builder.mul(group, number(int(LANES))))
        return self._builder.bitcast(self._builder.gep(self._data, [first]), self._vector)

    def load(self, row, group=None):
        return self._builder.load(self._at(row, group), align=4)

    def store(self, row, value) -> None:
        self._builder.store(value, self._at(row, None), align=4)


@inlined
def whole_groups(scratch, count):
    """How many groups of sixteen a strip of `count` elements takes: the last is filled with zeros."""
    groups = (count + LANES - uint64(1)) // LANES
    for row in range(uint64(len(scratch))):
        for i in range(count, groups * LANES):
            scratch[row, i] = 0
    return int64(groups)


@inlined
def end_row(lanes, totals, end, count):
    """Add the lanes to the totals where a row ends, or all `count` elements do."""
    if end % ROW == uint64(0) or end >= count:
        for k in range(uint64(len(totals))):
            total = 0.0
            for lane in range(LANES):
                total += lanes[k, lane]
                lanes[k, lane] = 0
            totals[k] += total
