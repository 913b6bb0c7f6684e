"""The safetensors header: what is written loads elsewhere, what is wrong is refused by name."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from expo.checkpoint.dtypes import ITEM_BYTES
from expo.checkpoint.headers import ALIGNMENT, header_bytes, layout, parse_header, printable
from expo.errors import CheckpointError


def header(entries: dict, data_bytes: int) -> tuple[bytes, int]:
    raw = json.dumps(entries).encode()
    return raw, 8 + len(raw) + data_bytes


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_layout_and_parse_are_inverse(tensors: list[tuple[str, list[int]]]) -> None:
    named = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    raw, data_bytes = layout(named, {"format": "pt"})
    assert len(raw) % ALIGNMENT == 0
    shard = parse_header(raw[8:], "f", len(raw) + data_bytes)
    empty_last = sorted(shard.tensors, key=lambda t: t.name)  # empty tensors share an offset
    assert [(t.name, t.dtype, t.shape) for t in empty_last] == named
    assert shard.metadata == {"format": "pt"}


def test_layout_is_read_by_safetensors(tmp_path: Path) -> None:
    raw, data_bytes = layout(
        [("a", "F32", (2, 3)), ("é", "BF16", (5,))], {"format": "pt", "x": "y"}
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw + bytes(range(data_bytes)))
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["a", "é"]
        assert file.metadata() == {"format": "pt", "x": "y"}
        assert file.get_slice("a").get_shape() == [2, 3]


BAD = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "b overlaps"),
    "hole": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20, "b follows a hole"),
    "hole at the start": ({"a": entry(4, 12, [2])}, 12, "a follows a hole"),
    "truncated": ({"a": entry(0, 8, [2])}, 7, "is truncated"),
    "trailing": ({"a": entry(0, 8, [2])}, 9, "has trailing bytes"),
    "size": ({"a": entry(0, 8, [3])}, 8, "gives a 8 bytes, not [3] × F32"),
    "negative": ({"a": entry(0, 8, [-2])}, 8, "impossible shape"),
    "backwards": ({"a": entry(8, 0, [2])}, 8, "gives a -8 bytes"),
    "dtype": ({"a": entry(0, 8, [2], "F4")}, 8, "stores a as F4, which expo cannot add"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "describes a without"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__ that is not a map of strings"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_wrong_header_is_refused_by_name(case: tuple[dict, int, str]) -> None:
    entries, data_bytes, message = case
    raw, file_bytes = header(entries, data_bytes)
    with pytest.raises(CheckpointError, match="shard") as caught:
        parse_header(raw, "shard", file_bytes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": 1, "a": 2}', "names a twice"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_header_that_is_no_object_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_header(raw, "shard", 8 + len(raw))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("first8", "file_bytes", "message"),
    [
        (b"\0\0", 2, "too short"),
        ((200_000_000).to_bytes(8, "little"), 10**9, "the format allows 100000000"),
        ((1000).to_bytes(8, "little"), 100, "header of 1000 bytes but the file has 100"),
    ],
)
def test_a_header_larger_than_the_file_is_refused(
    first8: bytes, file_bytes: int, message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        header_bytes(first8, "shard", file_bytes)
    assert message in str(caught.value)


@given(st.text(max_size=300))
def test_printable_never_passes_a_control_character(text: str) -> None:
    shown = printable(text)
    assert len(shown) <= 200
    shown = shown.removesuffix("…")  # what marks a cut
    assert not any(
        ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0x200B <= ord(c) <= 0x202E for c in shown
    )
