"""Which token string owns which embedding row, read from tokenizer files without running them."""

import json
from collections.abc import Iterator

from expo.checkpoint.files import Files
from expo.errors import TokenizerError


def read_vocabulary(files: Files) -> dict[int, str] | None:
    """Token strings by id, or None where no file says.

    Raises:
        TokenizerError: a tokenizer file is damaged.
    """
    try:
        tokens = _tokens(files)
        if tokens is not None:
            tokens |= _added(files)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TokenizerError(
            f"{files.label} has a damaged tokenizer file ({type(error).__name__}: {error})"
        ) from error
    return tokens


def _tokens(files: Files) -> dict[int, str] | None:
    if "tokenizer.json" in files.sizes:
        tokenizer = json.loads(files.read("tokenizer.json"))
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram lists [piece, score] in id order, the other models map token to id.
        if isinstance(vocabulary, list):
            tokens = {index: piece for index, (piece, _) in enumerate(vocabulary)}
        else:
            tokens = {index: token for token, index in vocabulary.items()}
        return tokens | {t["id"]: t["content"] for t in tokenizer.get("added_tokens") or []}
    if "tokenizer.model" in files.sizes:
        return dict(enumerate(_sentencepieces(files.read("tokenizer.model"))))
    if "vocab.json" in files.sizes:
        return {index: token for token, index in json.loads(files.read("vocab.json")).items()}
    return None


def _added(files: Files) -> dict[int, str]:
    added: dict[int, str] = {}
    if "added_tokens.json" in files.sizes:
        added = {index: t for t, index in json.loads(files.read("added_tokens.json")).items()}
    if "tokenizer_config.json" in files.sizes:
        decoder = json.loads(files.read("tokenizer_config.json")).get("added_tokens_decoder") or {}
        added |= {int(index): token["content"] for index, token in decoder.items()}
    return added


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
