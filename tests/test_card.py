"""The card: its front matter by the Hub's own loader, its snippet and its commands run, edits stay."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import expo as door
from expo.errors import CheckpointError, SpecError
from expo.output.manifest import Manifest
from expo.output.scores import read_scores
from expo.publishing.card import BEGIN, END, card, renewed
from expo.publishing.evaluations import eval_results
from expo.publishing.licences import terms
from expo.publishing.presentation import HEAT_MAP, cells, presented

from .conftest import Pair, Ran, extrapolate
from .hub_server import COMMIT, Hub
from .openchat import write_model

SFT, ALIGNED = "openchat/openchat-3.5-0106", "Nexusflow/Starling-LM-7B-beta"
STARLING = """---
license: apache-2.0
language:
- en
datasets:
- berkeley-nest/Nectar
tags:
- RLHF
---
# Starling
"""


@pytest.fixture(scope="module")
def starling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Hub]]:
    """A stand-in pair under the names of the real one, merged from a Hub on loopback, and verified."""
    root = tmp_path_factory.mktemp("starling")
    write_model(root / "sft")
    shutil.copytree(root / "sft", root / "aligned")
    for number, file in enumerate(sorted((root / "aligned").glob("*.safetensors"))):
        generator = torch.Generator().manual_seed(number)
        moved = {
            name: (t.float() + 1e-3 * torch.randn(t.shape, generator=generator)).bfloat16()
            for name, t in load_file(file).items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    (root / "aligned" / "README.md").write_text(STARLING)
    (root / "sft" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (root / "sft" / "NOTICE").write_text("openchat's notice\n")
    hub = Hub({SFT: root / "sft", ALIGNED: root / "aligned"})
    server = hub.start()
    models = [{"model": ALIGNED, "parameters": {"alpha": 1.5}}]
    spec = {"merge_method": "expo", "base_model": SFT, "models": models}
    (root / "spec.yml").write_text(yaml.safe_dump(spec))
    run([sys.executable, "-m", "expo", "merge", "spec.yml", "Starling-LM-7B-beta-ExPO"], root, hub)
    yield root / "Starling-LM-7B-beta-ExPO", hub
    server.shutdown()
    server.server_close()


def run(command: list[str], folder: Path, hub: Hub) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def test_the_front_matter_as_the_hub_reads_it(starling: tuple[Path, Hub]) -> None:
    data = ModelCard.load(starling[0] / "README.md").data.to_dict()
    assert data == {
        "base_model": [ALIGNED, SFT],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "expo"],
        "license": "apache-2.0",
        "language": ["en"],
        "datasets": ["berkeley-nest/Nectar"],
    }


def test_the_card_says_what_it_is(starling: tuple[Path, Hub]) -> None:
    text = (starling[0] / "README.md").read_text()
    assert "\n# Starling-LM-7B-beta-ExPO\n" in text
    assert "θ_sft + α·(θ_aligned − θ_sft)" in text
    assert "**α = 1.5**" in text
    assert "call the same **0.5**" in text
    assert "alpha 1.5 (paper alpha 0.5)" in text
    for name in (SFT, ALIGNED):
        assert f"[{name}](https://huggingface.co/{name})" in text
        assert f"https://huggingface.co/{name}/tree/{COMMIT}" in text
    assert "bfloat16; computed in float32 and rounded once, to nearest" in text
    assert re.search(r"passed \| \d\d checks", text)
    assert "<s>GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant: Hi<|end" in text
    assert "apache-2.0" in text.partition("## License")[2]
    assert str(starling[0].parent) not in text
    assert os.uname().nodename not in text


def test_the_manifest_tells_what_the_card_needs(starling: tuple[Path, Hub]) -> None:
    manifest = Manifest.of_folder(starling[0])
    assert manifest is not None
    said = manifest.sources["aligned"].said
    assert said is not None
    assert (said.license, said.language, said.datasets) == (
        "apache-2.0",
        ("en",),
        ("berkeley-nest/Nectar",),
    )
    assert manifest.example is not None
    assert manifest.example.messages[0] == ("user", "Hello")
    assert (starling[0] / "NOTICE").read_text() == "openchat's notice\n"
    assert set(manifest.beside) == {"NOTICE", "README.md"}
    assert "README.md" not in manifest.files
    old = json.loads(manifest.to_json())
    for key in ("flags", "example", "beside"):
        del old[key]
    for source in old["sources"].values():
        del source["said"], source["adapter_said"]
    assert Manifest.from_json(json.dumps(old)).sources["sft"].said is None


@pytest.mark.slow
def test_the_snippet_runs(starling: tuple[Path, Hub]) -> None:
    (snippet,) = blocks("python", (starling[0] / "README.md").read_text())
    snippet = snippet.replace("max_new_tokens=512", "max_new_tokens=3")
    assert run([sys.executable, "-c", snippet], starling[0].parent, starling[1])


@pytest.mark.slow
def test_it_comes_out_again(starling: tuple[Path, Hub], tmp_path: Path) -> None:
    text = (starling[0] / "README.md").read_text()
    (spec,), (command,) = blocks("yaml", text), blocks("bash", text)
    assert f"base_model: {SFT}@{COMMIT}" in spec
    (tmp_path / "spec.yml").write_text(spec)
    run([sys.executable, "-m", *command.split()], tmp_path, starling[1])
    for file in starling[0].glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_flags_are_part_of_how_to_reproduce(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    flags = ("--max-shard-size", "1MB", "--include", "*.txt", "--allow-missing", "a b")
    expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "-q", *flags)
    text = (tmp_path / "out" / "README.md").read_text()
    wanted = (
        "expo merge spec.yml out --allow-missing 'a b' --include '*.txt' --max-shard-size 1000000"
    )
    assert wanted in text
    assert "`sft`, `aligned`: local folders" in text
    assert "base_model:" not in text.partition("# ")[0]
    assert "license" not in text.partition("# ")[0]


@pytest.mark.slow
def test_the_command(starling: tuple[Path, Hub], tmp_path: Path, expo: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    shutil.copytree(starling[0], out)
    ran = expo("card", out)
    assert ran.out == (out / "README.md").read_text()
    assert ran.err == ""
    ran = expo("card", out, "--license", "cc-by-nc-4.0", "--json")
    assert json.loads(ran.out)["license"] == "cc-by-nc-4.0"
    assert json.loads(ran.out)["files"] == []
    results = write_results(tmp_path)
    ran = expo("card", out, "--results", results, "--write")
    files = [".eval_results/tatsu-lab--alpaca_eval.yaml", "README.md", HEAT_MAP]
    assert ran.err == f"{out}: wrote {', '.join(files)}\n"
    assert f"]({HEAT_MAP})" in (out / "README.md").read_text()
    assert (out / HEAT_MAP).read_bytes().startswith(b"\x89PNG")
    checks = {c.name: c.status for c in door.verify(out, quick=True).checks}
    assert (checks["orphans"], checks["manifest"]) == ("pass", "info")  # weights were not read
    assert checks["card"] == "info"
    assert expo("card", tmp_path / "none").code == 2
    assert "has no expo.json" in expo("card", tmp_path).err


def test_a_licence_that_is_not_clear_is_left_out(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5)
    ran = expo("card", tmp_path / "out")
    assert "warning: the licence is not clear: the card of aligned names no licence" in ran.err
    assert "## License" not in ran.out


def test_the_image_is_the_same_every_time(starling: tuple[Path, Hub]) -> None:
    manifest = Manifest.of_folder(starling[0])
    assert manifest is not None
    first, second = (presented(starling[0], manifest)[HEAT_MAP] for _ in range(2))
    assert first == second


def test_the_figures_of_the_heat_map(pair: Pair, tmp_path: Path) -> None:
    extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5)
    manifest = Manifest.of_folder(tmp_path / "out")
    assert manifest is not None
    found = cells(manifest)
    changes = door.diff(pair.sft, pair.aligned).modules
    assert found.keys() == {(m.layer, m.module) for m in changes}
    for m in changes:
        assert found[m.layer, m.module] == pytest.approx(m.statistics.relative_delta, rel=1e-9)


def test_what_a_person_wrote_stays(starling: tuple[Path, Hub], tmp_path: Path) -> None:
    manifest = Manifest.of_folder(starling[0])
    assert manifest is not None
    text = (starling[0] / "README.md").read_text()
    edited = (
        text.replace("tags:\n", "tags:\n- chat\n")
        .replace("library_name", "model_creator: me\nlibrary_name")
        .replace("# Starling-LM-7B-beta-ExPO", "# Our Starling\n\nAsk us anything.")
        .replace("**α = 1.5**", "**α = 99**")
        + "\n## Contact\n\nus\n"
    )
    again = renewed(edited, card(manifest, terms=terms(manifest, "cc-by-4.0")))
    data = ModelCard(again).data.to_dict()
    assert data["model_creator"] == "me"
    assert data["tags"] == ["merge", "expo", "chat"]
    assert data["license"] == "cc-by-4.0"
    assert "# Our Starling\n\nAsk us anything." in again
    assert "**α = 1.5**" in again
    assert "α = 99" not in again
    assert again.endswith("\n## Contact\n\nus\n")
    assert renewed(again, card(manifest, terms=terms(manifest, "cc-by-4.0"))) == again


def test_a_readme_without_marks_keeps_all_its_text(starling: tuple[Path, Hub]) -> None:
    text = (starling[0] / "README.md").read_text()
    own = "# Mine\n\nNothing of yours.\n"
    again = renewed(own, text)
    assert again.endswith(f"---\n{own}")
    assert ModelCard(again).data.to_dict()["base_model"] == [ALIGNED, SFT]
    assert BEGIN not in again


def test_names_from_outside_cannot_break_out(starling: tuple[Path, Hub]) -> None:
    manifest = Manifest.of_folder(starling[0])
    assert manifest is not None
    evil = replace(manifest.sources["sft"], model=f"a`b|<img>\n{END}", commit=None)
    example = replace(manifest.example, rendered=f"```\n{END}\n## x") if manifest.example else None
    text = card(replace(manifest, sources={**manifest.sources, "sft": evil}, example=example))
    assert "````text\n```" in text
    again = renewed(text, plain := card(manifest))
    assert again.partition(BEGIN)[2] == plain.partition(BEGIN)[2]
    ModelCard(text)


def write_results(folder: Path) -> Path:
    rows = [
        {"dataset": "tatsu-lab/alpaca_eval", "task": "alpaca_eval_2", "metric": "LC", "value": 26.4, "interval": [24.9, 27.9]},
        {"dataset": "tatsu-lab/alpaca_eval", "task": "alpaca_eval_2", "metric": "LC", "value": 25.8, "model": ALIGNED},
        {"dataset": "MT-Bench", "metric": "score", "value": 8.18, "source": "https://example.org/run"},
    ]  # fmt: skip
    file = folder / "results.json"
    file.write_text(json.dumps({"schema": "expo.results/1", "results": rows}))
    return file


def test_results_are_a_table_and_what_the_hub_reads(
    starling: tuple[Path, Hub], tmp_path: Path
) -> None:
    results = read_scores(write_results(tmp_path))
    manifest = Manifest.of_folder(starling[0])
    assert manifest is not None
    table = card(manifest, results=results).partition("## Evaluation")[2].partition("##")[0]
    assert f"| dataset | metric | `{ALIGNED}` | **Starling-LM-7B-beta-ExPO** |" in table
    assert "| 25.8 | **26.4** (24.9 … 27.9) |" in table
    assert "| MT-Bench | score | – | [**8.18**](https://example.org/run) |" in table
    (file,) = eval_results(results).items()
    assert file[0] == ".eval_results/tatsu-lab--alpaca_eval.yaml"
    assert yaml.safe_load(file[1]) == [
        {
            "dataset": {"id": "tatsu-lab/alpaca_eval", "task_id": "alpaca_eval_2"},
            "value": 26.4,
            "notes": "LC",
        }
    ]


def test_the_results_of_the_docs(starling: tuple[Path, Hub], tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "card.md").read_text()
    (text,) = blocks("json", page)
    (tmp_path / "results.json").write_text(text)
    found = door.card(starling[0], results=tmp_path / "results.json")
    assert "| MT-Bench | score | – | **8.18** |" in found.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "the file: Invalid JSON"),
        ('{"schema": "x", "results": []}', "is of schema 'x', not expo.results/1"),
        ('{"schema": "expo.results/1", "results": [{"dataset": "a", "metric": "b", "value": "c"}]}', "results.0.value"),
        ('{"schema": "expo.results/1", "results": [{"dataset": "a", "metric": "b", "value": 1, "vlaue": 2}]}', "results.0.vlaue"),
        ('{"schema": "expo.results/1", "results": [{"dataset": "a", "metric": "b", "value": 1, "source": "javascript:x"}]}', "is no link"),
    ],
)  # fmt: skip
def test_results_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(SpecError, match=re.escape(words)):
        read_scores(tmp_path / "r.json")
    with pytest.raises(SpecError, match="cannot be read"):
        read_scores(tmp_path / "none.json")


def test_the_python_door(starling: tuple[Path, Hub], tmp_path: Path) -> None:
    found = door.card(starling[0])
    assert (found.license, found.warnings, found.files) == ("apache-2.0", (), ())
    assert found.text == (starling[0] / "README.md").read_text()
    with pytest.raises(CheckpointError, match=r"has no expo\.json: expo did not make it"):
        door.card(tmp_path)
