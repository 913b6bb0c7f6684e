"""`expo compare`: two files of answers to the same prompts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import expo as door
from expo.errors import SpecError
from expo.operators.paired import paired, win_rate
from expo.output.scores import write_scores
from expo.results import CompareResult, Score

from .conftest import Ran


def answers(path: Path, rewards: list[float] | None, lengths: list[int] | None = None) -> Path:
    """A file in the form of the official search; its rewards beside it, as evaluate writes them."""
    rows = [
        {"prompt": f"p{n}", "output": "x" * (5 + n % 7), "length": 9 if lengths is None else lengths[n]}
        for n in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if rewards is not None:
        lines = "".join(
            json.dumps({"id": str(n), "reward": r}) + "\n" for n, r in enumerate(rewards)
        )
        path.with_name(f"{path.stem}.rewards.jsonl").write_text(lines)
    return path


@pytest.fixture
def rewards() -> list[list[float]]:
    generator = np.random.default_rng(0)
    base = generator.normal(0, 1, 40)
    return [base.tolist(), (base + generator.normal(0.4, 0.5, 40)).tolist()]


def test_the_difference_is_paired(tmp_path: Path, rewards: list[list[float]]) -> None:
    a, b = (answers(tmp_path / f"{n}.jsonl", r) for n, r in zip("ab", rewards, strict=True))
    result = door.compare(a, b)
    assert result.difference == paired(rewards[1], rewards[0])
    assert result.win_rate == win_rate(rewards[1], rewards[0])
    assert result.matched_difference is not None
    assert result.matched_difference.mean == pytest.approx(result.difference.mean)
    assert (result.length_a, result.length_unit) == (9, "tokens")
    assert door.compare(b, a).difference.mean == -result.difference.mean
    assert 0.1 < result.detectable < 0.4


def test_the_words_of_the_command(
    tmp_path: Path,
    rewards: list[list[float]],
    expo: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, values in zip("ab", rewards, strict=True):
        answers(Path(f"{name}.jsonl"), values)
    better = expo("compare", "a.jsonl", "b.jsonl").out.splitlines()
    assert better[0] == "b.jsonl is better than a.jsonl"
    assert better[2].startswith("difference 0.")
    assert "%, 95 % interval " in better[3]
    assert expo("compare", "b.jsonl", "a.jsonl").out.startswith("a.jsonl is worse than b.jsonl\n")
    same = expo("compare", "a.jsonl", "a.jsonl").out
    assert same.startswith("no difference: every prompt has the same reward on both sides\n")
    half = [reward * (-1) ** n for n, reward in enumerate(rewards[0])]
    answers(Path("c.jsonl"), half)
    unsure = expo("compare", "a.jsonl", "c.jsonl").out
    assert unsure.startswith("no difference shown: 40 prompts see differences from about 0.")
    parsed = json.loads(expo("compare", "a.jsonl", "b.jsonl", "--json").out)
    assert {*parsed} == {*CompareResult.__dataclass_fields__}


def test_what_length_alone_has_bought_is_said(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    generator = np.random.default_rng(1)
    longer = generator.integers(-20, 61, 40)
    noise = generator.normal(0, 0.05, 40)
    gain = np.tanh(longer / longer.std(ddof=1))
    a = answers(tmp_path / "a.jsonl", [0.0] * 40, [100] * 40)
    b = answers(tmp_path / "b.jsonl", (gain + noise).tolist(), (100 + longer).tolist())
    first = expo("compare", a, b).out.splitlines()[0]
    assert first.endswith(
        "is better than " + str(a) + ", but at matched length no difference is shown"
    )


def test_reward_files_are_numbers_in_order(
    tmp_path: Path, rewards: list[list[float]], expo: Callable[..., Ran]
) -> None:
    for name, values in zip("ab", rewards, strict=True):
        answers(tmp_path / f"{name}.jsonl", None)
        lines = "".join(f"{json.dumps(value)}\n" for value in values)  # the official script's
        (tmp_path / f"rewards_{name}.jsonl").write_text(lines)
    flags = [x for n in "ab" for x in ("--reward-file", tmp_path / f"rewards_{n}.jsonl")]
    ran = expo("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *flags, "--json")
    assert json.loads(ran.out)["difference"]["mean"] == paired(rewards[1], rewards[0]).mean
    once = expo("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *flags[:2])
    assert once.code == 2
    assert "give --reward-file twice" in once.err
    (tmp_path / "rewards_b.jsonl").write_text("1.0\n")
    short = expo("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *flags)
    assert "has 1 rewards" in short.err
    (tmp_path / "rewards_b.jsonl").write_text('1.0\n"good"\n')
    assert "rewards_b.jsonl:2: no reward" in (
        expo("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *flags).err
    )


def test_other_prompts_are_refused_by_name(tmp_path: Path, rewards: list[list[float]]) -> None:
    a, b = (answers(tmp_path / f"{n}.jsonl", r) for n, r in zip("ab", rewards, strict=True))
    lines = b.read_text().splitlines(keepends=True)
    b.write_text("".join([*lines[:7], lines[7].replace("p7", "q7"), *lines[8:]]))
    with pytest.raises(
        SpecError, match=r'b\.jsonl has no answer to "p7": a comparison needs the same'
    ):
        door.compare(a, b)
    b.write_text("".join([*lines[:39], lines[0]]))
    with pytest.raises(SpecError, match=r'b\.jsonl has no answer to "p39"'):
        door.compare(a, b)
    b.write_text("".join(reversed(lines)))  # another order is no other prompts
    (tmp_path / "b.rewards.jsonl").write_text("".join(f"{r}\n" for r in reversed(rewards[1])))
    assert door.compare(a, b).difference.mean == pytest.approx(
        np.mean(rewards[1]) - np.mean(rewards[0])
    )


def test_a_prompt_that_is_asked_twice(tmp_path: Path, rewards: list[list[float]]) -> None:
    """Benchmarks hold some: the first answer is paired with the first."""
    a, b = (answers(tmp_path / f"{n}.jsonl", r) for n, r in zip("ab", rewards, strict=True))
    for file in (a, b):
        file.write_text(file.read_text().replace('"p7"', '"p3"'))
    assert door.compare(a, b).difference == paired(rewards[1], rewards[0])
    b.write_text(b.read_text().replace('"p3"', '"p7"', 1))
    with pytest.raises(SpecError, match=r'b\.jsonl has only 1 of the answers to "p3"'):
        door.compare(a, b)


def test_rewards_with_names_go_to_their_answers(tmp_path: Path) -> None:
    """Whatever the order of the answers is by now."""
    rows = [
        {"id": n, "messages": [{"role": "assistant", "content": "x"}], "length": n}
        for n in range(9)
    ]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        lines = [json.dumps({"id": str(n), "reward": n**2}) + "\n" for n in range(9)]
        (tmp_path / f"{name}.rewards.jsonl").write_text("".join(lines))
    result = door.compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (result.difference.mean, result.difference.standard_error) == (0, 0)


def plain(path: Path, asked: list[str], names: list[object] | None = None) -> Path:
    """A file in the form of `evaluate` itself; the reward is the number of the prompt."""
    rows = [
        {
            "id": str(n) if names is None else names[n],
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}],
            "reward": float(text.strip("pq")),
        }
        for n, text in enumerate(asked)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_answers_are_paired_by_what_was_asked(tmp_path: Path) -> None:
    """Not by the number of their line, which stands in for a name where the prompts have none."""
    asked = [f"p{n}" for n in range(9)]
    a = plain(tmp_path / "a.jsonl", asked)
    other = door.compare(a, plain(tmp_path / "b.jsonl", asked[::-1]))
    assert (other.difference.mean, other.difference.standard_error) == (0, 0)
    with pytest.raises(SpecError, match=r'b\.jsonl has no answer to "p3"'):
        door.compare(a, plain(tmp_path / "b.jsonl", [*asked[:3], "q3", *asked[4:]]))


def test_one_question_under_several_names(tmp_path: Path) -> None:
    """What an assistant said before may tell them apart: their names do, in any order."""
    rows = [
        {"id": f"n{n}", "messages": [{"role": r, "content": c} for r, c in said], "reward": n}
        for n in range(9)
        for said in [[("user", "a"), ("assistant", f"{n}"), ("user", "b"), ("assistant", "x")]]
    ]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
    result = door.compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (result.difference.mean, result.difference.standard_error) == (0, 0)


@pytest.mark.parametrize(
    "line", ["NaN", "1e400", "1" + "0" * 400, "9" * 5000, "null", "true", '{"id": 1}']
)
def test_what_is_no_reward(line: str, tmp_path: Path) -> None:
    answers(tmp_path / "a.jsonl", None)
    (tmp_path / "r").write_text(f"1\n{line}\n")
    with pytest.raises(SpecError, match=r"r:2: (no reward|cannot be read)"):
        door.compare(
            tmp_path / "a.jsonl",
            tmp_path / "a.jsonl",
            rewards_a=tmp_path / "r",
            rewards_b=tmp_path / "r",
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1, "messages": [{"role": "assistant", "content": null}]}\n', "it has no text"),
        ('{"prompt": "a", "output": null}\n', "it has no text"),
        ('{"question_id": 1, "choices": [{"turns": "ab"}]}\n', "a list is empty or missing"),
        ('{"uid": 1, "messages": [{"content": {"answer": null}}]}\n', "it has no text"),
        ('{"prompt": "a", "output": "b", "length": 1e999}\n', "its length is inf"),
        ('{"prompt": "a", "output": "b", "length": 1' + "0" * 400 + "}\n", "too large"),
        ('{"text": "hi"}\n', "no answer in any of alpaca-eval, mt-bench"),
        ('{"question_id": 1, "choices": []}\n', "the answer is incomplete: a list is empty"),
        ('{"uid": "a", "messages": [{"content": "b"}]}\n', "the answer is incomplete"),
        ('{"prompt": "a", "output": "b"}\n', "has no rewards: give --reward-file for both"),
    ],
)
def test_what_cannot_be_compared(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(SpecError, match=message):
        door.compare(path, path)


def test_characters_where_a_side_has_no_tokens(tmp_path: Path) -> None:
    a = answers(tmp_path / "a.jsonl", [0.0] * 40)
    rows = [
        {"dataset": "d", "instruction": f"p{n}", "output": "yes", "generator": "g"}
        for n in range(40)
    ]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "b.rewards.jsonl").write_text("1\n" * 20 + "0\n" * 20)
    result = door.compare(a, tmp_path / "b.json")
    assert (result.length_b, result.length_unit) == (3, "characters")
    assert result.win_rate.mean == 0.75


def test_a_results_file_says_what_is_known(tmp_path: Path) -> None:
    scores = (
        Score("o/gsm8k", "exact_match", 0.61, "gsm8k", (0.58, 0.64), "https://host/run"),
        Score("ultrafeedback", "reward", 0.5),
    )
    write_scores(tmp_path / "r.json", scores)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["schema"] == "expo.results/1"
    assert content["results"] == [
        {
            "dataset": "o/gsm8k",
            "metric": "exact_match",
            "value": 0.61,
            "task": "gsm8k",
            "interval": [0.58, 0.64],
            "source": "https://host/run",
        },
        {"dataset": "ultrafeedback", "metric": "reward", "value": 0.5},
    ]
