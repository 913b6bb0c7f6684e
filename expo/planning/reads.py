"""Which bytes of which files the pieces of a plan are made of, for whoever fetches them before they are needed."""

from collections.abc import Iterator
from dataclasses import dataclass

from expo.checkpoint.dtypes import FLOATS
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo
from expo.checkpoint.weight import Weight
from expo.planning.chunks import Piece
from expo.planning.jobs import Blend, Copy

REQUESTS = 16  # at once: what a request waits for, others use
REQUEST_BYTES = 4 << 20
AHEAD_BYTES = 24 * REQUEST_BYTES
"""What may lie in memory before anybody asks for it, half of it on its way."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes begin … end of one file."""

    files: Files
    name: str
    begin: int
    end: int


def piece_ranges(piece: Piece) -> Iterator[FileRange]:
    """All that a piece needs. Of a tensor that is looked at whole before its first block that is all of it."""
    job, rule = piece.job, piece.job.rule
    if job.is_held_whole:
        for weight in job.inputs:
            yield from weight_ranges(weight, 0, weight.count)
    elif isinstance(rule, Blend) and piece.starts is not None:
        for weight, start in zip(rule.weights, piece.starts, strict=True):
            yield from weight_ranges(weight, start, piece.count)
    else:
        yield from weight_ranges(job.donor, piece.begin, piece.count)
        compared = rule.equal if isinstance(rule, Copy) and job.donor.dtype not in FLOATS else ()
        for other in compared:
            yield from weight_ranges(other, piece.begin, piece.count)


def weight_ranges(weight: Weight, begin: int, count: int) -> Iterator[FileRange]:
    """`count` elements of a weight from `begin` with their scales, and the whole factors of its adapter."""
    first, nbytes = weight.span(begin, count)
    yield FileRange(weight.files, weight.stored.file, first, first + nbytes)
    if weight.codes is not None:
        scale, (first, number) = weight.codes.scale, weight.codes.scale_span(begin, count)
        at = scale.begin + first * scale.item_bytes
        yield FileRange(weight.files, scale.file, at, at + number * scale.item_bytes)
    if weight.update is not None and weight.update_files is not None:
        yield _whole(weight.update_files, weight.update.a)
        yield _whole(weight.update_files, weight.update.b)


def _whole(files: Files, info: TensorInfo) -> FileRange:
    return FileRange(files, info.file, info.begin, info.begin + info.nbytes)
