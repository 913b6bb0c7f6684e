"""Which token string owns which embedding row, read from tokenizer files without running them."""

import json
from collections.abc import Callable, Iterator

from expo.checkpoint.files import Files
from expo.errors import TokenizerError


def read_vocabulary(files: Files) -> dict[int, str] | None:
    """Token strings by id, or None where no file says.

    Raises:
        TokenizerError: a tokenizer file is damaged.
        CheckpointError: one cannot be read.
    """
    for name, parse in _VOCABULARIES.items():
        if name in files.sizes:
            return _parsed(files, name, parse) | _added(files)
    return None


def _added(files: Files) -> dict[int, str]:
    added: dict[int, str] = {}
    for name, parse in _ADDED.items():
        if name in files.sizes:
            added |= _parsed(files, name, parse)
    return added


def _parsed(files: Files, name: str, parse: Callable[[bytes], dict[int, str]]) -> dict[int, str]:
    content = files.read(name)
    try:
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        what = f"{type(error).__name__}: {error}"
        raise TokenizerError(
            f"{files.label}/{name} is damaged ({what}): download it again"
        ) from error


def _of_tokenizers(content: bytes) -> dict[int, str]:
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    # Unigram lists [piece, score] in id order, the other models map token to id.
    if isinstance(vocabulary, list):
        tokens = {index: piece for index, (piece, _) in enumerate(vocabulary)}
    else:
        tokens = {index: token for token, index in vocabulary.items()}
    return tokens | {t["id"]: t["content"] for t in tokenizer.get("added_tokens") or []}


def _of_sentencepiece(content: bytes) -> dict[int, str]:
    return dict(enumerate(_sentencepieces(content)))


def _of_map(content: bytes) -> dict[int, str]:
    return {index: token for token, index in json.loads(content).items()}


def _of_decoder(content: bytes) -> dict[int, str]:
    decoder = json.loads(content).get("added_tokens_decoder") or {}
    return {int(index): token["content"] for index, token in decoder.items()}


_VOCABULARIES = {
    "tokenizer.json": _of_tokenizers,
    "tokenizer.model": _of_sentencepiece,
    "vocab.json": _of_map,
}
"""The first of these that is there says what the tokens are."""
_ADDED = {"added_tokens.json": _of_map, "tokenizer_config.json": _of_decoder}
"""All of these add to it."""


def _sentencepieces(model: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: `repeated SentencePiece pieces = 1 {string piece = 1}`.

    Twenty lines of protobuf's wire format spare a dependency
    (https://protobuf.dev/programming-guides/encoding/).
    """
    for field, value in _fields(model):
        if field == 1:
            yield next(piece for number, piece in _fields(value) if number == 1).decode()


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                length, at = _varint(message, at)
                yield key >> 3, message[at : at + length]
                at += length
            case other:
                raise ValueError(f"unknown wire type {other}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
