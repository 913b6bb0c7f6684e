"""The file of results that `expo publish --results` takes: `expo.results/1`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from expo.output.durable import place_file
from expo.results import Score

SCHEMA = "expo.results/1"


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """Write a file of results.

    Raises:
        OutputError: it cannot be written.
    """
    rows = [{k: v for k, v in asdict(score).items() if v is not None} for score in scores]
    text = json.dumps({"schema": SCHEMA, "results": rows}, indent=2, allow_nan=False)
    place_file(path, text.encode() + b"\n")
