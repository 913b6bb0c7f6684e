"""The files that trainers read to train the matrices with the most signal and freeze the rest.

Per type of module (all `self_attn.q_proj`, …) the top share is trained, as in Spectrum (2406.06623).
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expo.errors import OutputError
from expo.output.durable import unwritable, write_file
from expo.planning.modules import module_of
from expo.results import MatrixSpectrum

By = Literal["snr_mp", "snr_compat", "effective_rank"]

_PART = re.compile(r"(\[\d+\])?(:\w+)?$")  # of a stacked or fused tensor


@dataclass(frozen=True)
class Chosen:
    """Tensors to train, in the order of the model, and the score of every tensor."""

    trained: tuple[str, ...]
    scores: dict[str, float]


def choose(spectra: Iterable[MatrixSpectrum], percent: float, by: By) -> Chosen:
    """The `percent` of each module type with the highest score.

    A tensor of several matrices has the score of its best one. A score that is not defined, because
    nothing lies below the threshold, is the highest of its type.
    """
    found: dict[str, float] = {}
    for one in spectra:
        name = _PART.sub("", one.tensor)
        value = getattr(one, by)
        found[name] = max(found.get(name, -math.inf), math.inf if value is None else value)
    types: dict[str, list[str]] = {}
    for name in found:
        types.setdefault(module_of(name)[1], []).append(name)
    trained: set[str] = set()
    for names in types.values():
        count = max(1, round(len(names) * percent / 100))
        trained |= set(sorted(names, key=lambda name: -found[name])[:count])
    scores = {name: _finite(score, [found[n] for n in types[module_of(name)[1]]])
              for name, score in found.items()}  # fmt: skip
    return Chosen(tuple(name for name in found if name in trained), scores)


def write_training_files(chosen: Chosen, folder: Path, slug: str) -> tuple[Path, ...]:
    """Write one file for each reader into a new folder.

    - `axolotl.yml`: `unfrozen_parameters`, patterns for `re.match` with dots escaped
    - `trl.yml`: the same names verbatim, one a line after `- `
    - `snr_results_SLUG.json`: what axolotl's Spectrum plugin reads
    - `lora_targets.json`: `target_modules` for PEFT, full module names

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty: name another with --train-dir")
    patterns = "".join(f"- ^{re.escape(name)}$\n" for name in chosen.trained)
    names = "".join(f"- {name}\n" for name in chosen.trained)
    scores = {n: {"snr": score, "type": module_of(n)[1]} for n, score in chosen.scores.items()}
    modules = [name.removesuffix(".weight") for name in chosen.trained]
    contents = {
        "axolotl.yml": f"unfrozen_parameters:\n{patterns}",
        "trl.yml": f"unfrozen_parameters:\n{names}",
        f"snr_results_{slug}.json": json.dumps(scores, indent=2, allow_nan=False) + "\n",
        "lora_targets.json": json.dumps({"target_modules": modules}, indent=2) + "\n",
    }
    try:
        for name, text in contents.items():
            write_file(folder / name, text.encode())
    except OSError as error:
        raise unwritable(error, folder) from error
    return tuple(folder / name for name in contents)


def _finite(score: float, of_type: list[float]) -> float:
    """Readers want finite numbers: an infinite score becomes the highest finite one of its type."""
    if math.isfinite(score):
        return score
    return max((other for other in of_type if math.isfinite(other)), default=0.0)
