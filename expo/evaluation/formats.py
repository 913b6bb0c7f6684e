"""The forms of a file of answers, one entry each, exactly as the judges read and write them."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expo.errors import SpecError
from expo.evaluation.answers import Answer
from expo.sampling.prompts import Prompt, rows_of

Row = Mapping[str, object]


@dataclass(frozen=True)
class Output:
    """An answer as it stands in a file: what it answers (the prompt's text, where the file has it), its text.

    `length` is in tokens, `reward` what a reward model gave it, `name` the prompt's; None where the file does
    not say.
    """

    key: str
    text: str
    length: float | None = None
    reward: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class Format:
    """How one judge has it.

    `notes` are what whoever reads the file should know; `needs` are the fields that a prompt must come with. `settings` says how a prompt is answered unless the
    user does; `row` writes an answer of the model of that name; `reads` tells its rows from others'.
    """

    row: Callable[[Answer, str], Row]
    output: Callable[[Row], Output]
    reads: frozenset[str]
    needs: tuple[str, ...] = ()
    settings: Callable[[Prompt], dict[str, float]] = field(default=lambda _: {})
    is_list: bool = False
    turns: int = 1
    notes: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return ".json" if self.is_list else ".jsonl"


def _plain_row(answer: Answer, _: str) -> Row:
    last = {"role": "assistant", "content": answer.text}
    row = {"id": answer.prompt.id, "messages": [*map(dict, answer.asked), last]}
    row |= {"length": answer.length, "finish_reason": _finish(answer)}
    return row | ({} if answer.reward is None else {"reward": answer.reward})


def _plain_output(row: Row) -> Output:
    messages = _list(row["messages"])
    said = [_text(m["content"]) for m in messages if m["role"] == "assistant"]
    return Output(
        _conversation(messages),
        "\n".join(said),
        _number(row, "length"),
        _number(row, "reward"),
        str(row["id"]),
    )


def _conversation(messages: Sequence[Row]) -> str:
    """What was asked: of a single question its text, as other formats have it. A name may be no more than the
    number of a line; what an assistant said may be the model's own."""
    asked = [m for m in messages if m["role"] != "assistant"]
    if len(asked) == 1 and asked[0]["role"] == "user":
        return _text(asked[0]["content"])
    return "\n\n".join(f"{m['role']}: {_text(m['content'])}" for m in asked)


def _ultrafeedback_row(answer: Answer, _: str) -> Row:
    row: Row = {"prompt": _last_user(answer.prompt), "output": answer.replies[0].text}
    return {**row, "length": answer.length, "finish_reason": _finish(answer)}


def _ultrafeedback_output(row: Row) -> Output:
    return Output(str(row["prompt"]), _text(row["output"]), _number(row, "length"))


def _alpaca_row(answer: Answer, generator: str) -> Row:
    fields = answer.prompt.fields
    row = {"dataset": fields["dataset"], "instruction": fields["instruction"]}
    return row | {"output": answer.replies[0].text, "generator": generator}


def _alpaca_output(row: Row) -> Output:
    return Output(str(row["instruction"]), _text(row["output"]))


def _mt_bench_row(answer: Answer, generator: str) -> Row:
    return {
        "question_id": answer.prompt.fields["question_id"],
        "answer_id": _answer_id(answer, generator),
        "model_id": generator,
        "choices": [{"index": 0, "turns": [reply.text for reply in answer.replies]}],
        "tstamp": answer.time,
    }


def _mt_bench_output(row: Row) -> Output:
    (choice, *_) = _list(row["choices"])
    name = str(row["question_id"])
    return Output(name, "\n".join(map(_text, _list(choice["turns"]))), name=name)


_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)


def _mt_bench_settings(prompt: Prompt) -> dict[str, float]:
    """FastChat's temperature by category, its 1,024 tokens."""
    category = str(prompt.fields.get("category"))
    return {"temperature": _TEMPERATURES.get(category, 0.7), "max_new_tokens": 1024}


def _arena_hard_row(answer: Answer, generator: str) -> Row:
    said = answer.replies[0]
    return {
        "uid": answer.prompt.fields["uid"],
        "ans_id": _answer_id(answer, generator),
        "model": generator,
        "messages": [
            {"role": "user", "content": answer.prompt.fields["prompt"]},
            {"role": "assistant", "content": {"answer": said.text}},
        ],
        "tstamp": answer.time,
        "metadata": {"token_len": said.length or 0, **count_markdown(said.text)},
    }


def _arena_hard_output(row: Row) -> Output:
    text = _text(_list(row["messages"])[-1]["content"]["answer"])
    name = str(row["uid"])
    return Output(name, text, _number(row.get("metadata", {}), "token_len"), name=name)


def count_markdown(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold words outside of code, as Arena-Hard's style control counts them."""
    for code in re.findall(r"```([^`]*)```", text):
        text = text.replace(code, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


FORMATS: dict[str, Format] = {
    # tatsu-lab/alpaca_eval: --model_outputs, merged with the reference by instruction
    "alpaca-eval": Format(
        _alpaca_row,
        _alpaca_output,
        frozenset({"instruction", "output", "generator"}),
        needs=("dataset", "instruction"),
        is_list=True,
    ),
    # lm-sys/FastChat, llm_judge: data/mt_bench/model_answer/NAME.jsonl
    "mt-bench": Format(
        _mt_bench_row,
        _mt_bench_output,
        frozenset({"question_id", "choices"}),
        needs=("question_id", "category", "turns"),
        settings=_mt_bench_settings,
        turns=2,
    ),
    # lmarena/arena-hard-auto: data/BENCH/model_answer/NAME.jsonl
    "arena-hard": Format(
        _arena_hard_row,
        _arena_hard_output,
        frozenset({"uid", "messages"}),
        needs=("uid", "prompt"),
        notes=(
            "token_len counts the model's own tokens: style control compares the judge's, which "
            "arena-hard-auto's utils/add_markdown_info.py writes",
        ),
    ),
    # chujiezheng/LLM-Extrapolation: outputs_ultrafeedback/NAME.jsonl
    "ultrafeedback": Format(
        _ultrafeedback_row, _ultrafeedback_output, frozenset({"prompt", "output"})
    ),
    "jsonl": Format(_plain_row, _plain_output, frozenset({"id", "messages"}), turns=9),
}
"""By the name that `--format` takes."""


def check_prompts(prompts: Sequence[Prompt], form: str, path: Path) -> None:
    """Refuse prompts that this format cannot write.

    Raises:
        SpecError: a prompt lacks a field, or has more turns than the format holds.
    """
    known = FORMATS[form]
    for prompt in prompts:
        lacking = [name for name in known.needs if name not in prompt.fields]
        if lacking:
            raise SpecError(
                f"{path}: prompt {prompt.id} has no {lacking[0]}, which {form} needs: give the "
                "benchmark's own file, or --format jsonl"
            )
        if len(prompt.later) >= known.turns:
            raise SpecError(
                f"{path}: prompt {prompt.id} has {len(prompt.later) + 1} turns, {form} holds "
                f"{known.turns}: choose --format jsonl"
            )


def written(answers: Sequence[Answer], form: str, generator: str) -> str:
    """The file of answers."""
    rows = [FORMATS[form].row(answer, generator) for answer in answers]
    if FORMATS[form].is_list:
        return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rewards_path(out: Path) -> Path:
    """Where the rewards of a file of answers lie."""
    return out.with_name(f"{out.stem}.rewards.jsonl")


def rewards_text(answers: Sequence[Answer]) -> str:
    """One line an answer, in the order of the answers."""
    return "".join(
        json.dumps({"id": answer.prompt.id, "reward": answer.reward}) + "\n" for answer in answers
    )


def read_outputs(path: Path) -> tuple[Output, ...]:
    """The answers of a file in any of the formats.

    Raises:
        SpecError: the file cannot be read, or an entry is in none of the formats.
    """
    return tuple(_outputs(path))


def _outputs(path: Path) -> Iterator[Output]:
    for place, row in rows_of(path):
        form = next(
            (f for f in FORMATS.values() if isinstance(row, dict) and f.reads <= {*row}), None
        )
        if form is None:
            raise SpecError(f"{path}:{place}: no answer in any of {', '.join(FORMATS)}")
        try:
            yield form.output(row)  # pyright: ignore[reportArgumentType]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise SpecError(f"{path}:{place}: the answer is incomplete: {error}") from error


def _finish(answer: Answer) -> str:
    if answer.is_unfinished:
        return "length"
    return "content_filter" if answer.is_filtered else "stop"


def _last_user(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


def _answer_id(answer: Answer, generator: str) -> str:
    """A name for the answer: the same text of the same model has the same."""
    said = json.dumps([generator, answer.prompt.id, [reply.text for reply in answer.replies]])
    return hashlib.sha256(said.encode()).hexdigest()[:22]


def _list(value: object) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise TypeError("a list is empty or missing")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("it has no text")
    return value


def _number(row: object, name: str) -> float | None:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        raise ValueError(f"its {name} is {value}")
    return float(value)
