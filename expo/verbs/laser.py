"""`expo laser --accept-if`: laserRMT's loop, which keeps an edit only where held-out texts get no worse."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.headers import printable
from expo.compute.decompositions import Decompositions
from expo.compute.devices import for_models
from expo.compute.inputs import fetch
from expo.compute.stream import Tuning
from expo.errors import CheckpointError, SpecError
from expo.planning.build import build_plan
from expo.planning.jobs import MatrixJob
from expo.planning.plan import Plan
from expo.spec.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]

_LONGEST = 2048  # tokens of a text that count


@dataclass(frozen=True)
class Accepted:
    """The request with the edits that were accepted; perplexities (before, after) of both halves."""

    request: Request
    tried: int
    matrices: tuple[str, ...]
    decided_by: tuple[float, float]
    held_out: tuple[float, float]

    def summary(self) -> str:
        (a, b), (c, d) = self.decided_by, self.held_out
        return (
            f"{len(self.matrices)} of {self.tried} edits accepted; perplexity {a:.4g} → {b:.4g} on the half "
            f"that decided, {c:.4g} → {d:.4g} on the other"
        )


def accept(
    request: Request,
    texts: Path,
    *,
    device: str | None = None,
    progress: Progress | None = None,
) -> Accepted:
    """Try every edit of a one-model request in the loaded model, in the order of the files.

    An edit stays if the perplexity of every other line of `texts` does not get worse, given those that
    stayed before. The other lines have no say.

    Args:
        texts: UTF-8, one text a line; at least two.
        device: where the model is tried and matrices are taken apart; by default CUDA where there is one, and here.
        progress: called with (matrices tried, matrices in all).

    Raises:
        SpecError: the texts are too few, or the model is one that cannot be loaded.
        CheckpointError: no edit is accepted, or the loaded model is laid out differently.
        ExpoError: the device is not there.
    """
    by, where = Decompositions(Tuning.on(device).device), for_models(device)
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    _check_halves([lines[::2], lines[1::2]], texts)
    plan = build_plan(request)
    if plan.refusals:
        raise CheckpointError("; ".join(plan.refusals))
    if plan.donor.files.streams:
        raise SpecError("a model that is streamed cannot be tried: bring it to this disk first")
    if plan.donor.adapter is not None:
        raise SpecError("a model+adapter cannot be tried: merge the adapter first")
    model, halves = _load(plan, lines, where)
    _check_halves(halves, texts)  # a text of one token says nothing
    matrices = [(job.name, matrix) for job in plan.jobs for matrix in job.matrices]
    places = [_place(model, plan.donor, name, matrix) for name, matrix in matrices]
    before = [perplexity(model, half) for half in halves]
    best, labels = before[0], []
    for number, ((_, matrix), place) in enumerate(zip(matrices, places, strict=True)):
        original = place.clone()
        place.copy_(_cut(original, matrix, request.seed, by))
        reached = perplexity(model, halves[0])
        if reached <= best:
            best = reached
            labels.append(matrix.label)
        else:
            place.copy_(original)
        if progress:
            progress(number + 1, len(matrices))
    if not labels:
        raise CheckpointError(
            f"none of {len(matrices)} edits keeps the perplexity of {before[0]:.4g}: nothing to write"
        )
    found = Accepted(
        request,
        len(matrices),
        tuple(labels),
        (before[0], best),
        (before[1], perplexity(model, halves[1])),
    )
    target = "^(?:" + "|".join(map(re.escape, labels)) + ")$"
    (edit,) = request.edits
    edits = (replace(edit, target=target, layers=None),)
    return replace(found, request=replace(request, edits=edits, notes=(found.summary(),)))


def _check_halves(halves: Sequence[list], texts: Path) -> None:
    if not all(halves):
        raise SpecError(f"{texts}: needs two texts at least, one a line: one half decides")


def perplexity(model: "PreTrainedModel", texts: list[Tensor]) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each text.

    Args:
        texts: token ids (1, length) each.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in texts:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total, count = total + float(loss), count + ids.shape[1] - 1
    return math.exp(min(total / max(count, 1), 700.0))


def _load(
    plan: Plan, lines: list[str], device: Any
) -> tuple["PreTrainedModel", tuple[list[Tensor], ...]]:
    """The model in its own dtype, and the tokens of the lines: those that decide, the others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    files = plan.donor.files
    fetch(plan)
    folder = files.local_path("config.json").parent
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        said = printable(str(error).strip().splitlines()[0], 200)
        raise CheckpointError(f"transformers cannot load {plan.donor.label}: {said}") from error
    tokens = [
        tokenizer(line, return_tensors="pt", truncation=True, max_length=_LONGEST)["input_ids"].to(device)
        for line in lines
    ]  # fmt: skip
    halves = ([ids for ids in half if ids.shape[1] > 1] for half in (tokens[::2], tokens[1::2]))
    return model.eval().to(device), tuple(halves)


def _place(model: "PreTrainedModel", donor: Checkpoint, name: str, matrix: MatrixJob) -> Tensor:
    """Where the loaded model holds a matrix, as a view."""
    parameters = dict(model.named_parameters())
    shape = donor.weights[name].shape
    held = parameters.get(name)
    if held is None or tuple(held.shape) != tuple(shape):
        raise CheckpointError(
            f"{printable(name)} is laid out differently in the loaded model: its edit cannot be tried"
        )
    end = matrix.begin + matrix.count
    return held.data.view(-1)[matrix.begin : end].view(matrix.shape)


def _cut(original: Tensor, matrix: MatrixJob, seed: int, by: Decompositions) -> Tensor:
    """As `editing.edit_matrix` cuts a result."""
    values = original.float().cpu()
    for number, keep in enumerate(matrix.result):
        values = by.cut(values, keep, seed=seed, name=f"{matrix.label}/{number}")[0].matrix
    return values.to(original)
