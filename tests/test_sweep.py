"""`expo sweep` on the embedded pair: the rise, the cliff, a verdict; kills, changes, other folders."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import expo as door
from expo.checkpoint.reference import parse_reference
from expo.cli.sweep import sweep_text
from expo.demo.toy import MODELS, words
from expo.errors import ExpoError, OutputError, SpecError
from expo.output.scores import read_scores
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.plots.sweep import sweep_figure
from expo.spec.request import make_request
from expo.spec.resolved import resolved
from expo.sweeping import bench
from expo.sweeping.candidates import Candidates, numbers_of
from expo.sweeping.folder import lasting
from expo.sweeping.journal import Journal
from expo.sweeping.run import Search
from expo.verbs import sweep as verb

from .conftest import Ran

pytestmark = pytest.mark.filterwarnings("ignore")

PAIR = (MODELS / "sft", MODELS / "aligned")
REWARD = "expo.demo.toy:preferred"


def prompts(folder: Path, count: int) -> Path:
    file = folder / f"prompts-{count}.jsonl"
    file.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words(count, 99)))
    return file


def sweep(out: Path, count: int = 16, **more):
    """A small one, twelve answers a second."""
    asked = {
        "prompts": prompts(out.parent, count),
        "reward": REWARD,
        "alphas": "1,2.5",
        "decoding": {"temperature": 1.0},
        "batch_size": 4,
    }
    return door.sweep(more.pop("pair", PAIR), out, **(asked | more))


def test_a_full_disk_is_one_line() -> None:
    with (
        Journal(Path("/dev/full"), "kind") as journal,
        pytest.raises(
            OutputError,
            match="the disk of /dev/full is full: the answers so far are kept, make room",
        ),
    ):
        journal.append([{"a": 1}])


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".png"}


def test_the_toy_rises_falls_and_gets_a_verdict(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    ran = expo(
        "sweep", *PAIR, out, "--prompts", prompts(tmp_path, 256), "--reward", REWARD, "--temperature",
        1, "--batch-size", 64, "--second-reward", "expo.demo.toy:copied", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    verdict, points = found["verdict"], {p["alpha"]: p for p in found["points"]}
    assert verdict["beats"]
    assert 2 <= verdict["candidate"]["alpha"] <= 3.6
    assert points[verdict["candidate"]["alpha"]]["reward"]["mean"] > points[1.0]["reward"]["mean"]
    top = max(points)
    assert points[top]["beyond_cliff"]
    assert points[top]["reward"]["mean"] < points[1.0]["reward"]["mean"]
    assert points[1.5]["prompts"] == 128
    assert verdict["prompts"] == 128
    assert points[1.0]["prompts"] == 256
    assert verdict["second_reward"]["n"] == 128
    assert verdict["text"].startswith("Alpha ")
    assert "256 answers" not in ran.err
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    again = expo("sweep", *PAIR, out, "--prompts", prompts(tmp_path, 256), "--reward", REWARD,
                 "--temperature", 1, "--second-reward", "expo.demo.toy:copied")  # fmt: skip
    assert "resuming: " in again.err
    assert "cliff" in again.out
    assert f"expo merge {out}/chosen.yml OUT" in again.out
    assert verdict["text"] in again.out


def test_an_aligned_model_past_the_peak_is_told_so(tmp_path: Path) -> None:
    """Storm-7B's case: every α > 1 is worse."""
    door.extrapolate(*PAIR, tmp_path / "past", alpha=3.5, verify=False)
    result = sweep(
        tmp_path / "out",
        128,
        pair=(MODELS / "sft", tmp_path / "past"),
        alphas="auto",
        batch_size=64,
    )
    assert not result.verdict.beats
    assert result.verdict.at == {"alpha": 1.0}
    assert result.verdict.text.startswith(
        "No alpha beats the aligned model: every alpha above 1 that was tried is worse"
    )
    assert yaml.safe_load(result.chosen.read_text())["models"][0]["parameters"] == {"alpha": 1.0}
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [row["model"] for row in results] == ["the aligned model"]


def test_what_is_written(tmp_path: Path) -> None:
    result = sweep(tmp_path / "out", 64, alphas="1:3:1", second_reward="expo.demo.toy:copied")
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "samples.jsonl", "scores.jsonl", "sweep.json", "sweep.png", "chosen.yml", "results.json",
    }  # fmt: skip
    whole = json.loads((out / "sweep.json").read_text())
    assert whole["schema"] == "expo.sweep/1"
    assert whole["verdict"]["text"] == result.verdict.text
    assert whole["rewards"] == {"reward": REWARD, "second_reward": "expo.demo.toy:copied"}
    assert whole["decoding"]["temperature"] == 1.0
    assert str(tmp_path) not in (out / "sweep.json").read_text()
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()][1:]
    assert len(lines) == len({(line["alpha"], line["prompt"]) for line in lines}) == 192
    assert [p.alpha for p in result.points] == [1.0, 2.0, 3.0]
    assert result.points[0].difference is None
    score, *_ = read_scores(out / "results.json")  # as the card does
    assert (score.dataset, score.value) == ("prompts-64", result.verdict.reward.mean)
    assert result.verdict.beats
    assert (score.model or "").startswith(f"alpha {result.verdict.at['alpha']:g} (paper alpha ")
    assert score.metric == f"{REWARD}, mean, 32 prompts"
    merged = door.merge(result.chosen, tmp_path / "model", verify=False)
    assert merged.alpha == result.verdict.at["alpha"]


def test_the_chosen_spec_holds_wherever_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sft", "aligned"):
        (tmp_path / name).symlink_to(MODELS / name)
    spec = make_request("sft", "aligned").at(1.5)
    found = resolved(spec, lasting)
    assert [found["base_model"], found["models"][0]["model"]] == [
        str(tmp_path / name) for name in ("sft", "aligned")
    ]
    away = parse_reference("org/name@main")
    assert lasting(away) == str(away)


def test_noise_is_shared_between_alphas(tmp_path: Path) -> None:
    """Nearly the same model answers nearly the same: the difference of two α has a small error."""
    result = sweep(tmp_path / "out", 64, alphas="1,1.02")
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()][1:]
    texts = [{x["prompt"]: x["text"] for x in lines if x["alpha"] == a} for a in (1.0, 1.02)]
    assert sum(texts[0][p] == texts[1][p] for p in texts[0]) > 60
    assert result.points[1].difference is not None
    assert result.points[1].difference.standard_error < result.points[1].reward.standard_error / 3


def test_batch_size_changes_no_answer(tmp_path: Path) -> None:
    found = []
    for size in (4, 7):
        sweep(tmp_path / f"out-{size}", batch_size=size)
        lines = (tmp_path / f"out-{size}" / "samples.jsonl").read_text().splitlines()[1:]
        found.append({tuple(map(str, json.loads(line).values())) for line in lines})
    assert found[0] == found[1]


def test_a_run_that_is_cut_anywhere_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both journals end at any byte: the same sweep comes out, and whole batches are not made again."""
    out = tmp_path / "out"
    sweep(out)
    whole = contents(out)
    lottery = random.Random(0)
    generate, made = bench.generate, []

    def counted(*arguments, **more):
        made.append(len(arguments[2]))
        return generate(*arguments, **more)

    monkeypatch.setattr(bench, "generate", counted)
    for _ in range(4):
        made.clear()
        for name in ("samples.jsonl", "scores.jsonl"):
            kept = lottery.randrange(len(whole[name].splitlines()[0]) + 1, len(whole[name]))
            os.truncate(out / name, kept)
        there = (out / "samples.jsonl").read_bytes().count(b"\n") - 1
        for name in ("sweep.json", "chosen.yml"):
            (out / name).unlink()
        sweep(out)
        assert sum(made) == 32 - there // 4 * 4
        assert contents(out).keys() == whole.keys()
        for name in ("sweep.json", "chosen.yml", "results.json"):
            assert contents(out)[name] == whole[name]
        for name in ("samples.jsonl", "scores.jsonl"):
            assert sorted(contents(out)[name].splitlines()) == sorted(whole[name].splitlines())


def test_a_damaged_line_ends_what_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(out)
    whole = contents(out)
    lines = whole["samples.jsonl"].splitlines(keepends=True)
    lines[20] = b"\0" * (len(lines[20]) - 1) + b"\n"
    (out / "samples.jsonl").write_bytes(b"".join(lines))
    said: list[str] = []
    sweep(out, say=said.append)
    assert said == ["resuming: 19 answers are there"]
    assert contents(out)["sweep.json"] == whole["sweep.json"]
    assert sorted(contents(out)["samples.jsonl"].splitlines(keepends=True)) == sorted(
        whole["samples.jsonl"].splitlines(keepends=True)
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("samples.jsonl", '{"foo": 1}'),
        (
            "samples.jsonl",
            '{"alpha": "x", "prompt": "0", "text": "", "tokens": [], "finish_reason": ""}',
        ),
        (
            "samples.jsonl",
            '{"alpha": 1, "prompt": "0", "text": "", "tokens": null, "finish_reason": ""}',
        ),
        ("samples.jsonl", "[" * 99999),
        ("scores.jsonl", '{"alpha": 1, "prompt": "0", "reward": 1}'),
        (
            "scores.jsonl",
            '{"alpha": 1, "prompt": "0", "reward": NaN, "second_reward": null, "length": 1, '
            '"unfinished": false, "repetition": 0, "log_likelihood": 0}',
        ),
    ],
)
def test_a_line_of_something_else_ends_what_is_kept(name: str, line: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(out, 8)
    whole = contents(out)
    lines = whole[name].splitlines(keepends=True)
    (out / name).write_bytes(b"".join([*lines[:9], line.encode() + b"\n", *lines[9:]]))
    sweep(out, 8)
    assert contents(out)["sweep.json"] == whole["sweep.json"]
    assert sorted(contents(out)[name].splitlines()) == sorted(whole[name].splitlines())


@pytest.mark.parametrize("head", ["null", "[]", "5"])
def test_a_first_line_without_a_configuration_is_a_start(head: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").write_text(f'{{"expo.sweep/1": {head}}}\n')
    assert sweep(tmp_path / "out", 8).answers == 16


WRONG = [
    ({"alphas": []}, "alphas : give first:last:step"),
    ({"decoding": {"temprature": 1}}, "there is no setting temprature: one of temperature, top_k"),
    ({"device": "foo"}, "device 'foo' is none of cpu, cuda, cuda:N, mps"),
    ({"device": "cuda:99"}, "device cuda:99 cannot be used: "),
    ({"more": {"turns": ["a", "b"]}}, "prompt 8 has 2 turns, a sweep answers one"),
    ({"more": {"prompt": "x" * 99}}, r"prompt 8 has \d+ tokens, the model's context 64: leave"),
    ({"more": {"messages": [{"role": "robot", "content": "x"}]}}, "the chat template refuses"),
]


@pytest.mark.parametrize(("asked", "message"), WRONG)
def test_what_cannot_be_swept_is_said_before_anything_is_answered(
    asked: dict, message: str, tmp_path: Path
) -> None:
    """A prompt that is left out makes another sweep: answers by then would be lost."""
    more = dict(asked)
    file = prompts(tmp_path, 8)
    if extra := more.pop("more", None):
        text = file.read_text() + json.dumps(extra) + "\n"
        file = file.with_name("more.jsonl")
        file.write_text(text)
    with pytest.raises(ExpoError, match=message):
        sweep(tmp_path / "out", 8, **({"prompts": file} | more))
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_alphas_of_numpy(tmp_path: Path) -> None:
    result = sweep(tmp_path / "out", 8, alphas=np.arange(1, 3, 1.5))
    assert [point.alpha for point in result.points] == [1.0, 2.5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vary", "a=1,2", "--alphas", "1,2"), "--alphas: not with --vary"),
        (("--budget", 9), "--budget: only with --search cma"),
        (("--vary", "a=1,2", "--vary", "a=3"), "--vary a is given twice"),
    ],
)
def test_flags_that_would_be_ignored(
    flags: tuple, message: str, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    asked = ("--prompts", prompts(tmp_path, 8), "--reward", REWARD)
    ran = expo("sweep", *PAIR, tmp_path / "out", *asked, *flags)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_a_torn_first_line_is_a_start(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples.jsonl").write_text('{"expo.sw')
    assert sweep(out).answers == 32


@pytest.mark.slow
def test_killed_at_random_points(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "expo", "sweep", *map(str, PAIR), str(tmp_path / "out"), "--prompts",
        str(prompts(tmp_path, 64)), "--reward", REWARD, "--alphas", "1:3:0.5", "--temperature", "1",
        "--batch-size", "4",
    ]  # fmt: skip
    lottery, kills = random.Random(1), 0
    for _ in range(20):
        running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        journal = tmp_path / "out" / "samples.jsonl"
        before = journal.stat().st_size if journal.exists() else 0
        while running.poll() is None and not (journal.exists() and journal.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(lottery.random())
        if running.poll() is not None:
            break
        running.send_signal(signal.SIGKILL)
        running.communicate()
        kills += 1
    running.communicate()
    assert kills
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    sweep(tmp_path / "straight", 64, alphas="1:3:0.5")
    killed, straight = contents(tmp_path / "out"), contents(tmp_path / "straight")
    for name in ("sweep.json", "chosen.yml"):
        assert killed[name] == straight[name]
    assert sorted(killed["samples.jsonl"].splitlines()) == sorted(
        straight["samples.jsonl"].splitlines()
    )


@pytest.mark.slow
def test_another_configuration_is_refused_or_begun_anew(tmp_path: Path) -> None:
    out, said = tmp_path / "out", []
    sweep(out)
    for change, name in (
        ({"decoding": {"temperature": 0.5}}, "decoding"),
        ({"seed": 1}, "seed of the sampling"),
        ({"count": 24}, "prompts"),
        ({"pair": (MODELS / "sft", MODELS / "sft")}, "aligned aligned/model.safetensors"),
    ):
        with pytest.raises(OutputError, match=f"{name}.*name another OUT_DIR, or add --overwrite"):
            sweep(out, **change)
    assert sweep(out, alphas="1,2,2.5", say=said.append).answers == 48
    assert said == ["resuming: 32 answers are there"]
    said.clear()
    with pytest.raises(KeyboardInterrupt):
        sweep(out, seed=2, overwrite=True, progress=interrupt)
    assert {file.name for file in out.iterdir()} == {"samples.jsonl", "scores.jsonl"}
    sweep(out, overwrite=True)
    sweep(out, alphas="1,2,2.5")
    sweep(out, seed=1, overwrite=True, say=said.append)
    assert said == [
        f"{out} differs in: seed of the sampling: its 48 answers go, the sweep begins anew"
    ]


def interrupt(_done: int, _total: int) -> None:
    raise KeyboardInterrupt


def test_another_reward_scores_the_same_answers(tmp_path: Path) -> None:
    out, said = tmp_path / "out", []
    sweep(out)
    samples = (out / "samples.jsonl").read_bytes()
    result = sweep(out, reward="expo.demo.toy:copied", say=said.append)
    assert said[1] == "differs in: reward: the answers are kept and scored anew"
    assert (out / "samples.jsonl").read_bytes() == samples
    assert result.points[0].reward.mean > 0.9


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", "samples.jsonl"):
        (out / name).write_text('{"mine": true}')
        with pytest.raises(OutputError, match="holds files that no sweep wrote: name another"):
            sweep(out, overwrite=True)
    with pytest.raises(OutputError, match="is a file: name a directory"):
        sweep(out / "notes.txt")
    assert (out / "samples.jsonl").read_text() == '{"mine": true}'


def test_what_a_merge_would_say_is_said_before(tmp_path: Path) -> None:
    """Notes and warnings of the plan once, and which α its gate would refuse."""
    plan = build_plan(make_request(*map(str, PAIR)).at(1.0))

    def plan_of(point: tuple[float, ...]) -> Plan:
        refused = ("too much noise; go on with --force",) if point[0] > 1.2 else ()
        return replace(plan, refusals=refused, notes=("codes",), warnings=("mostly noise",))

    nothing: Any = None
    plans = Candidates(("alpha",), (1.0,), nothing, plan_of)
    for how in (Search(), Search({"alpha": (1.0, 1.3, 1.4, 1.5)})):
        said: list[str] = []
        verb._forewarn(plans, plan_of((1.0,)), how, said.append)
        assert said == [
            "warning: mostly noise",
            "note: codes",
            "warning: expo merge will refuse alpha 1.3, 1.4, 1.5: too much noise; go on with --force",
        ]


def test_one_sweep_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[str] = []

    def again(_done: int, _total: int) -> None:
        with pytest.raises(OutputError) as caught:
            sweep(out)
        seen.append(str(caught.value))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(out, progress=again)
    assert "is being written by another sweep: wait for it" in seen[0]


def test_progress_says_what_is_left(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sweep(tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (32, 32)
    assert [done for done, _ in seen] == list(range(4, 33, 4))
    assert {total for _, total in seen} == {32}


def test_accuracy_where_there_is_one_right_answer(tmp_path: Path) -> None:
    file = tmp_path / "exact.jsonl"
    asked = [{"question": word, "answer": f"ok {word}"} for word in words(24, 3)]
    file.write_text("\n".join(map(json.dumps, asked)))
    result = sweep(tmp_path / "out", exact=file)
    assert result.verdict.accuracy is not None
    assert result.verdict.accuracy_difference is not None
    assert result.verdict.accuracy_difference.n == 24
    assert 0 < result.verdict.accuracy[0] < result.verdict.accuracy[1]
    assert "; accuracy " in result.verdict.text
    made = (tmp_path / "out" / "exact-samples.jsonl").read_bytes()
    assert sweep(tmp_path / "out", exact=file).verdict == result.verdict
    assert (tmp_path / "out" / "exact-samples.jsonl").read_bytes() == made


def test_an_expo_spec_is_swept_whatever_its_alpha(tmp_path: Path) -> None:
    """What the spec leaves alone stays so: here the layers are the aligned model's at every α."""
    spec = {
        "merge_method": "expo",
        "base_model": str(PAIR[0]),
        "models": [{"model": str(PAIR[1]), "parameters": {"alpha": 1.3}}],
        "fix_first_layers": 2,
    }
    (tmp_path / "spec.yml").write_text(yaml.safe_dump(spec))
    result = sweep(tmp_path / "out", pair=tmp_path / "spec.yml", alphas="0.5,2.5")
    assert [p.alpha for p in result.points] == [0.5, 1.0, 2.5]
    chosen = yaml.safe_load(result.chosen.read_text())
    assert chosen["fix_first_layers"] == 2
    assert chosen["models"][0]["parameters"]["alpha"] == result.verdict.at["alpha"]
    plain = sweep(tmp_path / "plain", alphas="0.5,2.5")
    assert [p.log_likelihood for p in plain.points] != [p.log_likelihood for p in result.points]
    assert plain.points[1].log_likelihood == result.points[1].log_likelihood


SPEC = {
    "merge_method": "linear",
    "models": [
        {"model": str(PAIR[0]), "parameters": {"weight": 0.0}},
        {"model": str(PAIR[1]), "parameters": {"weight": 1.0}},
    ],
    "parameters": {"normalize": False},
}
LEFT, RIGHT = (f"models.{n}.parameters.weight" for n in (0, 1))


def test_whole_numbers_of_a_spec_stay_whole() -> None:
    """Layers are counted; a weight that is written as 1 may become 1.5."""
    spec = {
        "merge_method": "expo",
        "base_model": str(PAIR[0]),
        "models": [{"model": str(PAIR[1]), "parameters": {"alpha": 2}}],
        "fix_first_layers": 1,
    }
    names = ("fix_first_layers", "models.0.parameters.alpha")
    candidates = numbers_of(spec, names)
    assert candidates.baseline == (1.0, 2.0)
    spec = resolved(candidates.request_of((2.0, 1.5)))
    assert (spec["fix_first_layers"], spec["models"][0]["parameters"]["alpha"]) == (2, 1.5)
    with pytest.raises(SpecError, match=r"fix_first_layers: should be a whole number, not 1\.5"):
        candidates.request_of((1.5, 2.0))


def test_a_plot_that_cannot_be_drawn_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "find_spec", lambda _: None)
    said: list[str] = []
    assert sweep(tmp_path / "out", 8, say=said.append).plot is None
    assert said == ["no plot: it needs matplotlib: pip install 'expo-merge[plot]'"]
    assert not (tmp_path / "out" / "sweep.png").exists()


def test_a_plot_of_several_numbers_counts_candidates(tmp_path: Path) -> None:
    result = sweep(tmp_path / "out", 8)
    at = [{LEFT: 0.0, RIGHT: 1.0}, {LEFT: -1.5, RIGHT: 2.5}]
    points = [replace(p, at=a, alpha=None) for p, a in zip(result.points, at, strict=True)]
    several = replace(
        result, baseline=at[0], points=tuple(points), verdict=replace(result.verdict, at=at[1])
    )
    (upper, lower, *_) = sweep_figure(several, "r").axes
    assert "the spec as it is" in [text.get_text() for text in upper.get_legend().get_texts()]
    assert all(float(tick).is_integer() for tick in lower.get_xticks())
    points = [line for line in upper.get_lines() if line.get_marker() == "o"]
    assert {line.get_linestyle() for line in points} == {"None"}
    first, second = sweep_text(several).splitlines()[1:3]
    assert [first.split()[0], second.split()[0]] == ["1", "2"]


def test_points_on_fewer_prompts_are_marked(tmp_path: Path) -> None:
    """Their means are of other prompts, so their height says little."""
    result = sweep(tmp_path / "out", 8)
    few = replace(result, points=(result.points[0], replace(result.points[1], prompts=4)))
    for outcome, wanted in ((result, False), (few, True)):
        (upper, _, *_) = sweep_figure(outcome, "r").axes
        assert ("fewer prompts" in [t.get_text() for t in upper.get_legend().get_texts()]) == wanted
        joined = [line for line in upper.get_lines() if [*line.get_xdata()] == [1.0, 2.5]]  # pyright: ignore
        assert bool(joined) != wanted
        assert ("compare by the difference" in sweep_text(outcome)) == wanted


def test_any_number_of_a_spec_is_swept(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    """ExPO written as a linear merge: −1.5 and 2.5 are α = 2.5."""
    (tmp_path / "spec.yml").write_text(yaml.safe_dump(SPEC))
    ran = expo(
        "sweep", tmp_path / "spec.yml", tmp_path / "out", "--prompts", prompts(tmp_path, 128), "--reward",
        REWARD, "--temperature", 1, "--vary", f"{LEFT}=-1.5,0", "--vary", f"{RIGHT}=1,2.5",
        "--batch-size", 64,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len(found["points"]) == 4
    assert found["baseline"] == {LEFT: 0.0, RIGHT: 1.0}
    assert found["verdict"]["at"] == {LEFT: -1.5, RIGHT: 2.5}
    assert f"{LEFT}=-1.5, {RIGHT}=2.5 beats the spec as it is" in ran.out
    scores = read_scores(tmp_path / "out" / "results.json")
    assert [s.metric for s in scores] == [
        f"{REWARD}, {what}, 64 prompts" for what in ("mean", "over the spec as it is")
    ]
    chosen = yaml.safe_load((tmp_path / "out" / "chosen.yml").read_text())
    assert [m["parameters"]["weight"] for m in chosen["models"]] == [-1.5, 2.5]


@pytest.mark.slow
def test_cma_finds_what_a_grid_would(tmp_path: Path) -> None:
    pytest.importorskip("cma")
    asked = {
        "pair": SPEC, "vary": {LEFT: "-3:0:1", RIGHT: "1:4:1"}, "method": "cma", "budget": 20,
        "batch_size": 64,
    }  # fmt: skip
    result = sweep(tmp_path / "out", 128, **asked)
    assert len(result.points) <= 20
    assert result.verdict.beats
    made = contents(tmp_path / "out")
    again = sweep(tmp_path / "out", 128, **asked)
    assert again.points == result.points
    assert contents(tmp_path / "out") == made


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"alphas": "1"}, "the aligned model alone has nothing to be compared with"),
        ({"alphas": "1e39"}, r"alphas 1e\+39: no weight is finite beyond 3\.4e\+38"),
        ({"alphas": "x"}, "alphas x: give first:last:step"),
        ({"method": "cma"}, "--search cma needs --vary"),
        ({"vary": {"a": "1,2"}}, "only a spec has numbers to vary"),
        ({"pair": SPEC}, "linear has no alpha to sweep: vary its numbers"),
        ({"pair": SPEC, "vary": {"parameters.normalize": "0,1"}}, "the spec has no number there"),
        (
            {"pair": SPEC, "vary": {"models.9.x": "0,1"}},
            "--vary models.9.x: the spec has no number",
        ),
        ({"pair": SPEC, "vary": {LEFT: "0,1"}, "method": "cma"}, "moves several numbers"),
        ({"pair": SPEC, "vary": {LEFT: "0"}}, "the spec as it is has nothing to be compared with"),
        ({"count": 6}, "6 prompts are too few"),
        ({"preset": "paper"}, "preset paper is not one of expo-paper"),
        ({"reward": "expo.demo.toy:nothing"}, "has no function nothing"),
        ({"batch_size": 0}, "batch size 0: 1 or more"),
    ],
)
def test_what_cannot_be_swept(tmp_path: Path, more: dict, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        sweep(tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_without_cma_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expo.sweeping import cma

    monkeypatch.setattr(cma, "find_spec", lambda _: None)
    with pytest.raises(ExpoError, match=r"pip install 'expo-merge\[search\]'"):
        sweep(tmp_path / "out", pair=SPEC, vary={LEFT: "0,1", RIGHT: "0,1"}, method="cma")


def test_usage(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    more = ("--prompts", "p", "--reward", "r")
    for wrong in ((tmp_path,), ("a", "b", "c", tmp_path), PAIR):
        ran = expo("sweep", *wrong, *more)
        assert ran.code == 2
        assert "is a directory" not in ran.err.casefold()
    ran = expo("sweep", *PAIR, tmp_path / "out", *more, "--vary", "x")
    assert "--vary x: give PATH=VALUES" in ran.err
