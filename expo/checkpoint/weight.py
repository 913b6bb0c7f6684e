"""A tensor as the model has it: the bytes that are stored, what they stand for, what an adapter adds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from expo.checkpoint.adapter import LowRank
from expo.checkpoint.codes import Codes, Scales, read_scales
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo
from expo.checkpoint.reader import Reader


@dataclass(frozen=True, slots=True)
class Weight:
    """What is stored, as codes where there are `codes`, and the adapter's low-rank update on top."""

    stored: TensorInfo
    files: Files
    dtype: str
    update: LowRank | None = None
    update_files: Files | None = None
    codes: Codes | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape if self.codes is None else self.codes.shape(self.stored.shape)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def read_dtype(self) -> str:
        """In what its elements come before an update is added: as stored, codes as float32."""
        return self.stored.dtype if self.codes is None else "F32"

    @property
    def parts(self) -> Iterator[tuple[Files, TensorInfo]]:
        """What it is made of: the stored tensor, its scales, and the factors of an adapter."""
        yield self.files, self.stored
        if self.codes is not None:
            yield self.files, self.codes.scale
        if self.update is not None and self.update_files is not None:
            yield from ((self.update_files, info) for info in (self.update.a, self.update.b))

    def span(self, begin: int, count: int) -> tuple[int, int]:
        """Where elements begin … lie: (their first byte in the file, how many bytes)."""
        if self.codes is None:
            size = self.stored.item_bytes
            return self.stored.begin + begin * size, count * size
        first, nbytes = self.codes.span(begin, count)
        return self.stored.begin + first, nbytes


class LastScales:
    """The scales of one weight's matrices after the other; those that were read last are kept."""

    def __init__(self) -> None:
        self._last: tuple[Weight, tuple[int, int], Scales] | None = None

    def of(
        self, weight: Weight, begin: int, count: int, reader: Callable[[Files, str], Reader]
    ) -> Scales | None:
        """Of the matrices that hold elements begin …, as float32; None where they are no codes. Raises as `read_scales`.

        Args:
            reader: gives that of a file, which is asked for by its model and name.
        """
        if weight.codes is None:
            return None
        span, last = weight.codes.scale_span(begin, count), self._last
        if last is None or last[0] is not weight or last[1] != span:
            file = reader(weight.files, weight.codes.scale.file)
            scales = read_scales(weight.codes, span, file, weight.files.label)
            last = self._last = weight, span, scales
        return last[2]
