"""`expo evaluate`: a benchmark's prompts answered, in the form that its judge reads."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from statistics import fmean

from expo.compute.devices import for_models
from expo.errors import OutputError, SpecError
from expo.evaluation.answers import Answer, Question
from expo.evaluation.asking import Progress, Source, ask_all, best, score_all
from expo.evaluation.formats import FORMATS, check_prompts, rewards_path, rewards_text, written
from expo.evaluation.journal import Answers, journal_path, open_journal
from expo.evaluation.local import open_local
from expo.evaluation.server import open_endpoint
from expo.operators.paired import mean_interval
from expo.output.durable import place_file
from expo.output.journal import Fingerprint
from expo.results import EvaluateResult, Paired
from expo.sampling.decoding import check_preset
from expo.sampling.prompts import Prompt, read_prompts
from expo.spec.request import check_seed

Say = Callable[[str], None]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")


def evaluate(
    model: str | PathLike[str] | None,
    prompts: str | PathLike[str],
    *,
    out: str | PathLike[str],
    format: str = "jsonl",
    endpoint: str | None = None,
    served: str | None = None,
    generator: str | None = None,
    preset: str | None = None,
    settings: Mapping[str, float] | None = None,
    seed: int = 0,
    best_of: int = 1,
    reward: str | None = None,
    num_beams: int = 1,
    batch_size: int = 16,
    concurrency: int = 8,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> EvaluateResult:
    """Let a model answer prompts, and write the answers as the judge of `format` reads them.

    What is answered is kept beside `out` until all is done: the same call goes on from there.

    Args:
        model: a directory or a Hub id; None where `endpoint` serves the model.
        prompts: the benchmark's own file, or JSON lines.
        endpoint: a server that speaks OpenAI's chat protocol; `served` is the model's name there.
        generator: the model's name in the file. [default: the directory's, or the server's]
        preset: decoding settings by name; else the format's, the model's or the server's own.
        settings: over those: temperature, top_k, top_p, min_p, the penalties, max_new_tokens.
        best_of: answers to every prompt, of which the one with the highest `reward` is written.
        reward: a reward model (directory or Hub id), or `module:function`.
        num_beams: beam search in place of sampling.
        device: of a model in this process, like "cuda:0"; by default CUDA where there is one.
        progress: called with (answers so far, answers in all).

    Raises:
        SpecError: contradictory settings, or prompts that the format cannot hold.
        OutputError: `out` exists, cannot be written, or another run is at it.
        EndpointError, CheckpointError: no answer could be had.
    """
    check_seed(seed)
    given = dict(settings or {})
    _check(model, endpoint, preset, given, best_of, reward, num_beams)
    if device is not None:
        _check_device(device, endpoint, reward)
    if format not in FORMATS:
        raise SpecError(f"format {format} is none of {', '.join(FORMATS)}")
    _check_free(Path(out), overwrite=overwrite)
    asked = read_prompts(Path(prompts))
    check_prompts(asked, format, Path(prompts))
    source: Source = (
        open_local(
            str(model), preset=preset, num_beams=num_beams, batch_size=batch_size, device=device
        )
        if endpoint is None
        else open_endpoint(endpoint, served, preset=preset, threads=concurrency)
    )
    own = FORMATS[format].settings if preset is None else lambda _: {}
    questions = [Question(p, c, own(p) | given) for p in asked for c in range(best_of)]
    return _run(
        questions,
        source,
        Path(out),
        format=format,
        generator=generator or source.name,
        seed=seed,
        reward=reward,
        device=device,
        overwrite=overwrite,
        progress=progress,
        say=say,
    )


def _check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file unasked; rewards beside `out` are an unfinished run's own where its journal is."""
    rewards = rewards_path(out)
    known = (out, rewards) if not journal_path(out).exists() else (out,)
    if out.is_dir():
        raise OutputError(f"{out} is a directory: name a file, with --out")
    for path in known:
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists: choose another file, or add --overwrite")


def _check(
    model: object,
    endpoint: str | None,
    preset: str | None,
    given: Mapping[str, float],
    best_of: int,
    reward: str | None,
    num_beams: int,
) -> None:
    """Refuse what contradicts itself."""
    check_preset(preset, given)
    greedy = given.get("temperature") == 0
    for is_wrong, why in (
        (model is None and endpoint is None, "give a MODEL, or a server with --endpoint"),
        (model is not None and endpoint is not None, "give MODEL or --endpoint, not both: the server's model is --model NAME"),
        (best_of > 1 and reward is None, f"--best-of {best_of} needs a --reward to choose by"),
        (best_of > 1 and (greedy or num_beams > 1), f"--best-of {best_of} needs answers that differ: sample, with a temperature above 0"),
        (num_beams > 1 and endpoint is not None, "--num-beams searches in this process: leave --endpoint out"),
        *((num_beams > 1 and name in given, f"--num-beams draws nothing: leave --{name.replace('_', '-')} out") for name in _SAMPLING),
    ):  # fmt: skip
        if is_wrong:
            raise SpecError(why)


def _check_device(device: str, endpoint: str | None, reward: str | None) -> None:
    """Refuse a device that nothing would run on, or that is not there."""
    if endpoint is not None and reward is None:
        raise SpecError("--device: the server has its own; it goes with a MODEL or a --reward")
    for_models(device)


def _run(
    questions: Sequence[Question],
    source: Source,
    out: Path,
    *,
    format: str,
    generator: str,
    seed: int,
    reward: str | None,
    device: str | None,
    overwrite: bool,
    progress: Progress | None,
    say: Say,
) -> EvaluateResult:
    started = time.monotonic()
    prompts = tuple(question.prompt for question in questions if question.candidate == 0)
    candidates = len(questions) // len(prompts)
    print_ = _fingerprint(questions, source, seed)
    by = None if reward is None else _identity(reward)
    with open_journal(out, prompts, print_, by, overwrite=overwrite) as (answers, said):
        if said:
            say(said)
        ask_all(questions, source, seed=seed, answers=answers, progress=progress)
        source.close()  # a reward model may need the room
        if reward is not None and by is not None:
            _score(answers, reward, by, device, say)
        kept = [best(answers, prompt, candidates) for prompt in prompts]
        mean = _mean_reward(kept)
        _place(out, kept, written(kept, format, generator), has_rewards=reward is not None)
    lengths = [answer.length for answer in kept if answer.length is not None]
    first = [answers.scored[prompt.id, 0] for prompt in prompts] if reward else []
    return EvaluateResult(
        out=out,
        format=format,
        generator=generator,
        prompts=len(prompts),
        candidates=candidates,
        length=fmean(lengths) if len(lengths) == len(kept) else None,
        unfinished_share=fmean(answer.is_unfinished for answer in kept),
        reward=mean,
        first_reward=fmean(first) if first else None,
        seconds=time.monotonic() - started,
        warnings=(
            *_equal_candidates(answers, prompts, candidates),
            *_empty(kept),
            *_filtered(kept),
            *FORMATS[format].notes,
        ),
    )


def _place(out: Path, kept: Sequence[Answer], text: str, *, has_rewards: bool) -> None:
    """The answers, their rewards beside them, and nothing of an earlier run."""
    if has_rewards:
        place_file(rewards_path(out), rewards_text(kept).encode())
    else:
        rewards_path(out).unlink(missing_ok=True)
    place_file(out, text.encode())
    journal_path(out).unlink()


def _identity(reward: str) -> str:
    """What tells the reward from a changed one; fails before anything is generated if there is none."""
    from expo.sampling.rewards import identity

    return identity(reward)


def _score(answers: Answers, reward: str, by: str, device: str | None, say: Say) -> None:
    from expo.sampling.rewards import open_reward

    score_all(answers, open_reward(reward, device=for_models(device), say=say), by=by)


def _mean_reward(kept: Sequence[Answer]) -> Paired | None:
    values = [answer.reward for answer in kept if answer.reward is not None]
    return mean_interval(values) if len(values) > 1 else None


def _fingerprint(questions: Sequence[Question], source: Source, seed: int) -> Fingerprint:
    asked = [(q.prompt.id, *map(dict, q.prompt.messages), q.prompt.later) for q in questions]
    settings = [sorted(q.settings.items()) for q in questions]
    parts = {
        "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        "seed": str(seed),
    }
    return Fingerprint(parts | source.parts)


def _empty(kept: Sequence[Answer]) -> tuple[str, ...]:
    count = sum(not answer.text.strip() for answer in kept)
    return (f"{count} of {len(kept)} answers are empty",) if count else ()


def _filtered(kept: Sequence[Answer]) -> tuple[str, ...]:
    count = sum(answer.is_filtered for answer in kept)
    return (f"{count} of {len(kept)} answers are cut by the server's filter",) if count else ()


def _equal_candidates(
    answers: Answers, prompts: Sequence[Prompt], candidates: int
) -> tuple[str, ...]:
    def texts(prompt: Prompt) -> set[str]:
        return {answers.found[prompt.id, candidate].text for candidate in range(candidates)}

    if candidates == 1 or any(len(texts(prompt)) > 1 for prompt in prompts):
        return ()
    return ("all candidates of every prompt are equal: sample, with a temperature above 0",)
