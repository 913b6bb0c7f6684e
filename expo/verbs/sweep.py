"""`expo sweep`: find the α worth publishing, without writing a checkpoint."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from expo.compute.devices import for_models
from expo.compute.inputs import fetch
from expo.errors import SpecError
from expo.output.durable import place_file
from expo.output.journal import fingerprint, identities
from expo.planning.plan import Plan, alpha_warnings
from expo.results import SweepResult
from expo.sampling.decoding import Decoding, check_preset
from expo.sampling.decoding import decoding as decoding_of
from expo.sampling.exact import Question, read_questions
from expo.sampling.generate import check_fit
from expo.sampling.live import Live, build
from expo.sampling.prompts import Prompt, read_prompts
from expo.sampling.rewards import Reward, identity, label, open_reward
from expo.spec.grid import read_values
from expo.spec.request import check_seed
from expo.spec.resolved import resolved, to_yaml
from expo.sweeping.bench import REWARD, SECOND, Bench, Chunk
from expo.sweeping.candidates import Candidates, alphas_of, grid, numbers_of
from expo.sweeping.cma import check_search
from expo.sweeping.folder import (
    KIND,
    SAMPLES,
    SCORES,
    claimed,
    lasting,
    rescored,
    results_json,
    resume,
    sweep_json,
)
from expo.sweeping.journal import Journal
from expo.sweeping.run import Search, chunked, conclude, grader, halves, once, search
from expo.sweeping.search import FIRST

if TYPE_CHECKING:
    from expo.compute.stream import Progress
    from expo.spec.read import Spec

Say = Callable[[str], None]
Pathlike = str | PathLike[str]

_LARGEST = 3.4e38


def sweep(
    spec: "Spec | tuple[Pathlike, Pathlike]",
    out: Pathlike,
    *,
    prompts: Pathlike,
    reward: str,
    alphas: str | Sequence[float] = "auto",
    vary: Mapping[str, str] | None = None,
    method: Literal["grid", "cma"] = "grid",
    budget: int = 100,
    second_reward: str | None = None,
    exact: Pathlike | None = None,
    preset: str | None = None,
    decoding: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    device: str | None = None,
    overwrite: bool = False,
    progress: "Progress | None" = None,
    say: Say = lambda _: None,
) -> SweepResult:
    """Answer `prompts` at every α, score the answers, and say which α is worth publishing.

    No checkpoint is written: one model in memory is set to each α, with the weights that `extrapolate` would
    write. The run can be killed; the same call goes on where it was.

    Args:
        spec: a spec of `merge_method: expo` (its own α does not matter), or (SFT, aligned).
        out: a directory for the answers, scores, `sweep.json`, the plot, `chosen.yml`, `results.json`.
        prompts: JSON lines of `{"prompt": …}` or `{"messages": […]}`.
        reward: a reward model (directory or Hub id), or `module:function`.
        alphas: "1.0:1.6:0.1", numbers, or "auto", which races and widens. α = 1 is always among them.
        vary: instead of α, other numbers of the spec, by their place in it, with a grid each; the spec
            as it is is always among the candidates.
        method: of `vary`: every combination, or CMA-ES inside the ranges with `budget` candidates.
        exact: JSON lines of `{"question": …, "answer": …}`.
        decoding: fields of `expo.sampling.decoding.Decoding`, over the preset's, over the model's own.
        device: like "cuda:0"; by default CUDA where there is one.
        overwrite: begin anew where `out` holds another sweep.
        progress: called with (answers made, answers asked for so far).

    Raises:
        SpecError, CheckpointError, HubError, OutputError: one line, with the cure.
    """
    started = time.monotonic()
    check_seed(seed)
    plans, how = _asked(spec, alphas, vary, method, budget)
    questions = None if exact is None else read_questions(Path(exact))
    parts = _prompts(Path(prompts), seed, batch_size, say)
    named = {REWARD: reward} | ({} if second_reward is None else {SECOND: second_reward})
    where = for_models(device)
    check_preset(preset, decoding or {})
    with ExitStack() as stack:
        stack.enter_context(claimed(Path(out)))
        rewards = {
            name: open_reward(one, device=where, batch_size=batch_size, say=say)
            for name, one in named.items()
        }
        first = plans.plan_of(plans.baseline)
        _forewarn(plans, first, how, say)
        fetch(first)
        live = build(first, device=where)
        asked = [*parts.all, *(question.prompt for question in questions or ())]
        check_fit(live.model, live.tokenizer, asked)
        chosen = _decoding(live, preset, decoding or {})
        task = _Task(plans, Path(out), parts, questions, named, seed, overwrite, say, chosen)
        bench = _bench(task, live, rewards, stack)
        bench.tick = progress or bench.tick
        result = _run(task, how, bench, _exactness(task, live, stack))
    result = replace(result, seconds=time.monotonic() - started)
    _write(task, result)
    return result


@dataclass(frozen=True)
class _Prompts:
    path: Path
    batch_size: int
    choosing: list[Chunk]
    held_out: list[Chunk]

    @property
    def all(self) -> list[Prompt]:
        return [prompt for chunk in (*self.choosing, *self.held_out) for prompt in chunk]


@dataclass(frozen=True)
class _Task:
    """What was asked for."""

    plans: Candidates
    out: Path
    prompts: _Prompts
    questions: tuple[Question, ...] | None
    rewards: Mapping[str, str]
    seed: int
    overwrite: bool
    say: Say
    decoding: Decoding


def _asked(
    spec: "Spec | tuple[Pathlike, Pathlike]",
    alphas: str | Sequence[float],
    vary: Mapping[str, str] | None,
    method: str,
    budget: int,
) -> tuple[Candidates, Search]:
    """The candidates, and how they are searched."""
    if vary:
        values = {name: read_values(text, what=f"--vary {name}") for name, text in vary.items()}
        if method == "cma":
            check_search(values)
            return numbers_of(spec, tuple(values)), Search(values, budget)
        for name, numbers in values.items():
            _check_range(f"--vary {name}", numbers)
        plans = numbers_of(spec, tuple(values))
        if grid(values) == (plans.baseline,):
            raise SpecError(
                "--vary: these are the spec's own values: the spec as it is has nothing to be compared with"
            )
        return plans, Search(values)
    if method == "cma":
        raise SpecError("--search cma needs --vary: alpha alone is swept by a grid, or auto")
    text = alphas if isinstance(alphas, str) else ",".join(repr(float(alpha)) for alpha in alphas)
    if text == "auto":
        return alphas_of(spec), Search()
    values = read_values(text)
    _check_range("alphas", values)
    if values == (1.0,):
        raise SpecError("alphas 1: the aligned model alone has nothing to be compared with")
    return alphas_of(spec), Search({"alpha": values})


def _check_range(what: str, values: Sequence[float]) -> None:
    """Refuse what float32, in which weights are computed, does not hold."""
    most = max(values, key=abs)
    if abs(most) > _LARGEST:
        raise SpecError(f"{what} {most:g}: no weight is finite beyond {_LARGEST:g}")


def _forewarn(plans: Candidates, first: Plan, how: Search, say: Say) -> None:
    """Say before the first answer what a merge would say, and which α it would refuse."""
    of_alpha = alpha_warnings(first.request)  # of the baseline's own, which is not the question
    for warning in first.warnings:
        if warning not in of_alpha:
            say(f"warning: {warning}")
    for note in first.notes:
        say(f"note: {note}")
    if plans.names != ("alpha",):
        return  # of other numbers, refused ones cannot be tried
    tried = {(alpha,) for alpha in FIRST} if how.values is None else {*grid(how.values)}
    refused = sorted(point[0] for point in tried if plans.plan_of(point).refusals)
    if refused:
        why = plans.plan_of((refused[0],)).refusals[0]
        which = ", ".join(f"{alpha:g}" for alpha in refused)
        say(f"warning: expo merge will refuse alpha {which}: {why}")


def _prompts(path: Path, seed: int, batch_size: int, say: Say) -> _Prompts:
    if batch_size < 1:
        raise SpecError(f"batch size {batch_size}: 1 or more")
    read = read_prompts(path)
    prompts = once(read)
    if twice := len(read) - len(prompts):
        say(f"{path}: {twice} prompts ask what another asks: each conversation counts once")
    if talk := next((prompt for prompt in prompts if prompt.later), None):
        raise SpecError(
            f"{path}: prompt {talk.id} has {len(talk.later) + 1} turns, a sweep answers one: give "
            '{"messages": […]}, which ends with the turn to answer'
        )
    parts = halves(prompts, seed=seed, batch_size=batch_size)
    return _Prompts(path, batch_size, *parts)


def _decoding(live: Live, preset: str | None, given: Mapping[str, float]) -> Decoding:
    own = live.model.generation_config
    assert own is not None
    return decoding_of(own, preset, **given)


def _bench(
    task: _Task, live: Live, rewards: Mapping[str, Reward], stack: ExitStack, prefix: str = ""
) -> Bench:
    """The bench with its two journals, and what they hold."""
    samples = stack.enter_context(Journal(task.out / f"{prefix}{SAMPLES}", KIND))
    scores = stack.enter_context(Journal(task.out / f"{prefix}{SCORES}", KIND))
    bench = Bench(live, task.plans, task.decoding, task.seed, rewards, samples, scores)
    asked = _configuration(task)
    if prefix:  # the questions' answers: they go when the main ones do
        asked["questions"] = repr(task.questions)
        known = resume(
            samples, asked, task.out, is_entry=bench.is_answer, overwrite=True, say=_nothing
        )
        bench.load(known, rescored(scores, asked, task.out, is_entry=bench.is_score, say=_nothing))
        return bench
    judged = {name: identity(one) for name, one in task.rewards.items()}
    known = resume(
        samples, asked, task.out, is_entry=bench.is_answer, overwrite=task.overwrite, say=task.say
    )
    said = task.say if known else _nothing
    scored = rescored(scores, asked | judged, task.out, is_entry=bench.is_score, say=said)
    bench.load(known, scored)
    return bench


def _nothing(_: str) -> None:
    """Say nothing."""


def _exactness(task: _Task, live: Live, stack: ExitStack) -> tuple[Bench, list[Chunk]] | None:
    """The bench of the questions with one right answer, and the questions."""
    if task.questions is None:
        return None
    bench = _bench(task, live, {REWARD: grader(task.questions)}, stack, prefix="exact-")
    return bench, chunked([q.prompt for q in task.questions], task.prompts.batch_size)


def _configuration(task: _Task) -> dict[str, str]:
    """What decides an answer, but for the point it is given at."""
    plan = task.plans.plan_of(task.plans.baseline)
    said = sorted((p.id, [dict(message) for message in p.messages]) for p in task.prompts.all)
    return {
        **fingerprint(plan, identities(plan)).parts,
        "what is swept": ", ".join(task.plans.names),
        "prompts": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
        "decoding": repr(task.decoding),
        "seed of the sampling": str(task.seed),
    }


def _run(
    task: _Task, how: Search, bench: Bench, questions: tuple[Bench, list[Chunk]] | None
) -> SweepResult:
    choosing, held_out = task.prompts.choosing, task.prompts.held_out
    common = search(bench, how, choosing, held_out, seed=task.seed)
    points, verdict = conclude(bench, choosing, held_out, common=common, questions=questions)
    return SweepResult(
        out=task.out,
        baseline=bench.named(bench.baseline),
        points=points,
        verdict=verdict,
        prompts=len(task.prompts.all),
        answers=sum(point.prompts for point in points),
        chosen=task.out / "chosen.yml",
        plot=task.out / "sweep.png" if find_spec("matplotlib") else None,
        seconds=0.0,
    )


def _write(task: _Task, result: SweepResult) -> None:
    point = tuple(result.verdict.at[name] for name in task.plans.names)
    spec = resolved(task.plans.request_of(point), lasting)
    place_file(result.chosen, to_yaml(spec).encode())
    plan = task.plans.plan_of(point)
    names = {checkpoint.reference: checkpoint.label for checkpoint in plan.sources.values()}
    about = {
        "chosen": resolved(plan.request, lambda reference: names[reference]),
        "prompts": {"file": task.prompts.path.name, "count": result.prompts},
        "rewards": {name: label(one) for name, one in task.rewards.items()},
        "decoding": asdict(task.decoding),
        "seed": task.seed,
    }
    place_file(task.out / "sweep.json", sweep_json(result, about).encode())
    dataset, judge = task.prompts.path.stem, label(task.rewards[REWARD])
    place_file(task.out / "results.json", results_json(result, dataset, judge).encode())
    if result.plot is None:
        task.say("no plot: it needs matplotlib: pip install 'expo-merge[plot]'")
    else:
        from expo.plots.heatmap import save
        from expo.plots.sweep import sweep_figure

        save(sweep_figure(result, judge), result.plot)
