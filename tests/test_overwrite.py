"""`--overwrite` replaces models and adapters, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

import expo as door
from expo.demo.toy import MODELS
from expo.planning.build import build_plan
from expo.spec.request import make_request

from .conftest import Pair, Ran, extrapolate, run_plan, write_checkpoint

SFT, ALIGNED = MODELS / "sft", MODELS / "aligned"


@pytest.fixture
def out(pair: Pair, tmp_path: Path) -> Path:
    """A model that expo made."""
    return extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5).out


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def write(folder: Path, *names: str, content: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


STRANGE = {
    "a repository and code": ([".git/HEAD", ".git/objects/ab/cd", "code.py"], ".git/, code.py"),
    "a thesis": (["thesis.tex"], "thesis.tex"),
    "a note in a folder of the model": (["additional_chat_templates/tool.jinja", "additional_chat_templates/a/b.txt"], "additional_chat_templates/a/"),
    "a picture that the card does not show": (["holiday.png"], "holiday.png"),
    "weights below": (["old/model.safetensors"], "old/"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE.values(), ids=STRANGE)
def test_what_is_no_part_of_a_model_is_named_and_kept(
    case: tuple[list[str], str], out: Path, pair: Pair, expo: Callable[..., Ran]
) -> None:
    names, shown = case
    write(out, *names)
    before = files(out)
    ran = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.3, "--overwrite", "-q")
    assert ran.code == 1
    assert ran.err == (
        f"expo: {out} holds more than a model: {shown}; --overwrite replaces models only: move "
        "these away, or choose another OUT\n"
    )
    assert files(out) == before
    refused = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.3, "-q").err
    assert refused == f"expo: {out} exists and is not empty: choose another\n"


def test_a_folder_that_is_no_model_is_not_replaced(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    out = tmp_path / "out"
    write(out, "README.md", "LICENSE", "config.json", "thesis.tex")
    (out / "empty").mkdir()
    (out / "link").symlink_to(pair.sft)
    ran = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.3, "--overwrite", "-q")
    assert ran.code == 1
    assert "holds no model: LICENSE, README.md, config.json, empty/, link and 1 more; " in ran.err
    assert len(list(out.iterdir())) == 6
    assert (pair.sft / "config.json").exists()


def test_what_published_models_hold_is_replaced(
    out: Path, pair: Pair, expo: Callable[..., Ran]
) -> None:
    write(out, ".gitattributes", ".eval_results/mt.yaml", "model.sig", "LICENSE", "vocab.json")
    write(out, "README.md", content="# Mine\n![the reward](assets/Reward.PNG)\n")
    write(out, "assets/Reward.PNG")
    flags = ("--alpha", 1.3, "--overwrite", "-q")
    assert expo("extrapolate", pair.sft, pair.aligned, out, *flags).code == 0
    assert "assets/Reward.PNG" not in files(out)


def test_a_model_of_others_and_what_was_included_are_replaced(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    out = write_checkpoint(tmp_path / "out", pair.sft_tensors, shards=2)
    write(out, "tokenizer.json", "generation_config.json")
    write(pair.aligned, "notes/eval.txt")
    flags = ("--alpha", 1.3, "--overwrite", "-q")
    included = expo("extrapolate", pair.sft, pair.aligned, out, *flags, "--include", "notes/*.txt")
    assert included.code == 0, included.err
    assert (out / "notes" / "eval.txt").exists()
    again = expo("extrapolate", pair.sft, pair.aligned, out, *flags)
    assert again.code == 0, again.err
    assert not (out / "notes").exists()


def test_what_appears_while_it_runs_is_kept(pair: Pair, out: Path) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.3))
    before = files(out)

    def meanwhile(_done: int, _total: int) -> None:
        write(out, "notes.txt")

    with pytest.raises(door.OutputError, match=r"holds more than a model: notes\.txt"):
        run_plan(plan, out, overwrite=True, progress=meanwhile)
    assert files(out) == sorted([*before, "notes.txt"])
    (out / "notes.txt").unlink()
    assert run_plan(plan, out, overwrite=True).alpha == 1.3  # the finished model was kept
    assert [p.name for p in out.parent.glob(".out*")] == []


def test_an_out_that_appears_while_it_runs_is_kept(pair: Pair, tmp_path: Path) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.3))
    out = tmp_path / "out"
    with pytest.raises(door.OutputError, match=r"exists and is not empty: choose another$"):
        run_plan(plan, out, progress=lambda *_: write(out, "notes.txt"))
    assert files(out) == ["notes.txt"]


def test_every_verb_keeps_what_is_strange(
    tmp_path: Path, expo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("out"), "thesis.tex")
    spec = f"""
merge_method: linear
name: half
models:
  - {{model: {SFT}, parameters: {{weight: 1}}}}
---
merge_method: linear
models:
  - {{model: half, parameters: {{weight: 1}}}}
"""
    Path("two.yml").write_text(spec)
    Path("one.yml").write_text(spec.partition("---")[0].replace("name: half", ""))
    for command in (
        ("merge", "one.yml", "out"),
        ("merge", "two.yml", "out"),
        ("laser", ALIGNED, "out", "--keep", "rank=2"),
        ("extract-lora", ALIGNED, "out", "--minus", SFT, "--rank", 2),
    ):
        ran = expo(*command, "--overwrite", "-q")
        assert ran.code == 1, command
        assert "holds no model: thesis.tex; --overwrite replaces models only" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.yml", "out", "two.yml"]
    with pytest.raises(door.OutputError, match=r"exists and is not empty: choose another$"):
        door.merge("two.yml", "out")


def test_an_adapter_is_replaced_by_one(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    command = ("extract-lora", ALIGNED, tmp_path / "out", "--minus", SFT, "--rank", 2, "-q")
    assert expo(*command).code == 0
    assert expo(*command, "--overwrite").code == 0
    write(tmp_path / "out", "adapter_model.bin")
    assert "holds more than a model: adapter_model.bin" in expo(*command, "--overwrite").err


def test_the_demo_replaces_a_demo_only(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    write(tmp_path / "out", "reward.png", "thesis.tex")
    ran = expo("demo", "--out", tmp_path / "out", "-q")
    assert ran.code == 1
    assert ran.err == (
        f"expo: {tmp_path / 'out'} holds what no demo has made: reward.png, thesis.tex; name "
        "another directory with --out\n"
    )
    assert files(tmp_path / "out") == ["reward.png", "thesis.tex"]
