"""Prompts: conversations that wait for an answer, from the files that the benchmarks come in."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from expo.errors import SpecError

Message = Mapping[str, str]

_IDS = ("id", "question_id", "uid", "prompt_id")
_FORMS = '{"prompt": "Hello"}, {"messages": [...]}, {"instruction": ...} or {"turns": [...]}'


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and a name that no other prompt of the file has.

    `later` are the user's turns after the first answer. `fields` is what the file says about it,
    for formats that repeat some of it.
    """

    id: str
    messages: tuple[Message, ...]
    later: tuple[str, ...] = ()
    fields: Mapping[str, object] = field(default_factory=dict, compare=False)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file: JSON lines, a JSON list, or parquet.

    Each is one of `{"prompt": …}` (Arena-Hard, and plain lines), `{"messages": […]}` (UltraFeedback; an
    answer at the end is left out), `{"instruction": …}` (AlpacaEval) or `{"turns": […]}` (MT-Bench), with the name under `id`,
    `question_id`, `uid` or `prompt_id`, else its number.

    Raises:
        SpecError: the file cannot be read, or an entry is no prompt, or two have one name.
    """
    rows = enumerate(rows_of(path))
    prompts = tuple(_prompt(row, number, path, place) for number, (place, row) in rows)
    if not prompts:
        raise SpecError(f"{path} holds no prompt: give {_FORMS} a line")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise SpecError(f"{path} has two prompts with the id {prompt.id}: give each its own")
        seen.add(prompt.id)
    return prompts


def rows_of(path: Path) -> Iterator[tuple[int, object]]:
    """The entries of a file with their places from 1: of lines, of a JSON list, or of parquet.

    Raises:
        SpecError: the file cannot be read, or is not JSON.
    """
    try:
        if path.suffix == ".parquet":
            yield from enumerate(_parquet(path), start=1)
            return
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} cannot be read: {error}: save it as UTF-8") from error
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        yield from enumerate(_json(text, path, 1), start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json(line, path, number)


def _json(text: str, path: Path, first: int) -> list:
    """The value of some lines, of which the first has that number."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise SpecError(f"{path}:{line}: is not JSON: {error.msg}") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise SpecError(
            f"{path}:{first}: holds half of a character, {half!a}, which no file can: write the whole one"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a deep nest
        raise SpecError(f"{path}:{first}: cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(";")[0]


def _parquet(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SpecError(f"{path}: parquet needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise SpecError(f"{path} is no parquet: {str(error).splitlines()[0]}") from error


def _prompt(row: object, number: int, path: Path, place: int) -> Prompt:
    """The prompt of an entry: `number` of those before it is its name where it has none."""
    if not isinstance(row, dict):
        raise SpecError(f"{path}:{place}: no prompt: give {_FORMS}")
    name = str(next((row[key] for key in _IDS if row.get(key) is not None), number))
    match row:
        case {"messages": [*messages]} if all(map(_is_message, messages)) and _until_answer(
            messages
        ):
            return Prompt(name, _until_answer(messages), fields=row)
        case {"turns": [str(first), *later]} if all(isinstance(turn, str) for turn in later):
            return Prompt(name, (_user(first),), tuple(later), fields=row)
        case {"prompt": str(text)} | {"instruction": str(text)}:
            return Prompt(name, (_user(text),), fields=row)
    raise SpecError(f"{path}:{place}: no prompt: give {_FORMS}")


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _until_answer(messages: list[Message]) -> tuple[Message, ...]:
    """The conversation without an answer at its end."""
    has_answer = bool(messages) and messages[-1]["role"] == "assistant"
    return tuple(messages[:-1] if has_answer else messages)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
