"""Results of evaluations, `expo.results/1`: what `expo sweep` and `expo evaluate` write and a card shows.

    {"schema": "expo.results/1", "results": [
      {"dataset": "tatsu-lab/alpaca_eval", "task": "alpaca_eval_2", "metric": "LC win rate, %", "value": 26.4,
       "interval": [24.9, 27.9], "source": "https://…"},
      {"dataset": "tatsu-lab/alpaca_eval", "task": "alpaca_eval_2", "metric": "LC win rate, %", "value": 25.8,
       "model": "Nexusflow/Starling-LM-7B-beta"}]}

`dataset`, `metric` and `value` are required; `expo.results.Score` says what each is.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from expo.errors import SpecError
from expo.output.durable import place_file
from expo.results import Score

SCHEMA = "expo.results/1"


@dataclass(frozen=True)
class _File:
    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    schema: str
    results: tuple[Score, ...]


def scores_json(scores: Sequence[Score]) -> str:
    rows = [{k: v for k, v in asdict(score).items() if v is not None} for score in scores]
    values = {"schema": SCHEMA, "results": rows}
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """Write a file of results.

    Raises:
        OutputError: it cannot be written.
    """
    place_file(path, scores_json(scores).encode())


def read_scores(file: Path) -> tuple[Score, ...]:
    """Read a file of results.

    Raises:
        SpecError: it cannot be read, or is of another form.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        read = TypeAdapter(_File).validate_json(file.read_bytes())
    except OSError as error:
        raise SpecError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpecError(f"{file}: {where}: {first['msg']} (it should be {SCHEMA})") from error
    if read.schema != SCHEMA:
        raise SpecError(f"{file} is of schema {read.schema!r}, not {SCHEMA}")
    for score in read.results:
        if score.source is not None and not re.fullmatch(r"https?://[^\s()<>]+", score.source):
            raise SpecError(f"{file}: source {score.source!r} is no link (https://…)")
    return read.results
