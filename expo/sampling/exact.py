"""Questions with one right answer."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from expo.errors import SpecError
from expo.sampling.prompts import Prompt, rows_of

_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")
"""A minus behind a number or a word is a dash or a difference."""


@dataclass(frozen=True)
class Question:
    prompt: Prompt
    answer: str


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a JSON-lines file: `{"question": …, "answer": …}`.

    Raises:
        SpecError: the file cannot be read, a line is no question, or asks again for another answer.
    """
    found: list[Question] = []
    answers: dict[str, str] = {}
    for place, row in rows_of(path):
        question = _question(row, place, path)
        text = question.prompt.messages[0]["content"]
        if not is_right(question.answer, answers.setdefault(text, question.answer)):
            raise SpecError(
                f"{path}:{place}: this question has another answer in a line before: one is right"
            )
        found.append(question)
    if len(found) < 2:
        raise SpecError(f"{path} holds {len(found)} questions: an accuracy takes two or more")
    return tuple(found)


def is_right(text: str, answer: str) -> bool:
    """Whether an answer of the model is the right one.

    Of a number the last number in the text decides, as for GSM8K; of anything else the text as a whole,
    without regard to case, spaces and a full stop at its end.
    """
    wanted = _number(answer)
    if wanted is not None:
        numbers = _NUMBER.findall(text.replace("−", "-"))
        return bool(numbers) and _number(numbers[-1]) == wanted
    return _plain(text) == _plain(answer)


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().replace(",", "").replace("−", "-"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None  # "nan" and "infinity" are words


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _question(row: object, number: int, path: Path) -> Question:
    match row:
        case {"question": str(text), "answer": str() | int() | float() as answer}:
            prompt = Prompt(f"exact {number}", ({"role": "user", "content": text},))
            return Question(prompt, str(answer).rpartition("#### ")[2])
    raise SpecError(f'{path}:{number}: no question: a line like {{"question": …, "answer": …}}')
