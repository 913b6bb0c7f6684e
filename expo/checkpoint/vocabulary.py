"""Which token string owns which embedding row, read from tokenizer files without running them."""

from collections.abc import Callable, Iterable, Iterator

from expo.checkpoint.files import Files, read_whole
from expo.checkpoint.headers import printable
from expo.checkpoint.parsing import parse_json, shown
from expo.errors import TokenizerError

_MOST_ID = 1 << 31
_MOST_FIELDS = 2_000_000  # of a SentencePiece model; the largest have a million pieces


def read_vocabulary(files: Files) -> dict[int, str] | None:
    """Token strings by id, or None where no file says.

    Raises:
        TokenizerError: a tokenizer file is damaged, or gives one id to two tokens.
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
    content = read_whole(files, name)
    try:
        return parse(content)
    except ValueError as error:
        where = f"{files.label}/{name}"
        raise TokenizerError(f"{where} is damaged ({error}): download it again") from error


def _of_tokenizers(content: bytes) -> dict[int, str]:
    tokenizer = _object(parse_json(content), "the file")
    vocabulary = _object(tokenizer.get("model"), "model").get("vocab")
    # Unigram lists [piece, score] in id order, the other models map token to id.
    if isinstance(vocabulary, list):
        pairs = [(_piece(entry), index) for index, entry in enumerate(vocabulary)]
    else:
        pairs = list(_object(vocabulary, "model.vocab").items())
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise ValueError(f"added_tokens is a list, not {shown(added)}")
    entries = [_object(entry, "an entry of added_tokens") for entry in added]
    return _by_id([*pairs, *((entry.get("content"), entry.get("id")) for entry in entries)])


def _of_sentencepiece(content: bytes) -> dict[int, str]:
    return dict(enumerate(_sentencepieces(content)))


def _of_map(content: bytes) -> dict[int, str]:
    return _by_id(_object(parse_json(content), "the file").items())


def _of_decoder(content: bytes) -> dict[int, str]:
    said = _object(parse_json(content), "the file").get("added_tokens_decoder") or {}
    decoder = _object(said, "added_tokens_decoder")
    tokens = {index: _object(token, f"token {shown(index)}") for index, token in decoder.items()}
    return _by_id((token.get("content"), _number(index)) for index, token in tokens.items())


_VOCABULARIES = {
    "tokenizer.json": _of_tokenizers,
    "tokenizer.model": _of_sentencepiece,
    "vocab.json": _of_map,
}
"""The first of these that is there says what the tokens are."""
_ADDED = {"added_tokens.json": _of_map, "tokenizer_config.json": _of_decoder}
"""All of these add to it."""


def _by_id(pairs: Iterable[tuple[object, object]]) -> dict[int, str]:
    """Tokens by their ids: a row that two tokens claim would be matched by either."""
    tokens: dict[int, str] = {}
    for token, index in pairs:
        if not isinstance(token, str):
            raise ValueError(f"a token is text, not {shown(token)}")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < _MOST_ID:
            raise ValueError(f"{shown(token)} has {shown(index)} for its id")
        if tokens.setdefault(index, token) != token:
            both = f"{printable(tokens[index], 40)} and {printable(token, 40)}"
            raise ValueError(f"id {index} belongs to two tokens, {both}")
    return tokens


def _object(value: object, what: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is an object, not {shown(value)}")
    return value


def _piece(entry: object) -> object:
    if not (isinstance(entry, list) and len(entry) == 2):
        raise ValueError(f"a piece has a text and a score, not {shown(entry)}")
    return entry[0]


def _number(text: str) -> object:
    return int(text) if text.isdecimal() and len(text) < 20 else text


def _sentencepieces(model: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: `repeated SentencePiece pieces = 1 {string piece = 1}`.

    Forty lines of protobuf's wire format spare a dependency
    (https://protobuf.dev/programming-guides/encoding/). How it was trained (field 2) follows the pieces: a
    file that was cut between two pieces lacks it.
    """
    is_whole = False
    for count, (field, value) in enumerate(_fields(model)):
        if count > _MOST_FIELDS:
            raise ValueError(f"more than {_MOST_FIELDS} fields")
        if field == 1:
            piece = next((text for number, text in _fields(value) if number == 1), None)
            if piece is None:
                raise ValueError("a piece has no text")
            yield piece.decode()
        is_whole = is_whole or field == 2
    if not is_whole:
        raise ValueError("cut short")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of every field; of numbers the content is left out."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        length = 0
        match key & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                length = 8
            case 5:
                length = 4
            case 2:
                length, at = _varint(message, at)
            case other:
                raise ValueError(f"unknown wire type {other}")
        if at + length > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[at : at + length] if key & 7 == 2 else b""
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("cut short")
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
