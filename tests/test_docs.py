"""Every command and snippet of README and docs runs; every help text in docs is the real one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import expo
from expo.cli.main import cli
from expo.demo.toy import MODELS, words
from expo.evaluation.formats import FORMATS
from expo.operators.methods import IN_MERGEKIT, NOT_IN_MERGEKIT, TRANSFORMS
from expo.operators.methods import METHODS as METHOD_TABLE
from expo.verification.run import CHECKS

from .chat_server import Chat, serving
from .hub_server import Hub
from .hub_writing import Account, WritableHub
from .publishing import TOKEN
from .quantized import FP8, quantized, write_quantized

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
METHODS, LOW_RANK, REMOTE, SWEEP, EVALUATE = (
    (ROOT / "docs" / name).read_text()
    for name in ("methods.md", "low_rank.md", "remote.md", "sweep.md", "evaluate.md")
)
HUB_MODELS = ("openchat/openchat-3.5-0106", "Nexusflow/Starling-LM-7B-beta")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.fixture(scope="module")
def hub() -> Iterator[WritableHub]:
    """Every Hub id in README and specs, served from the demo pair; and a place to publish to."""
    repositories = dict.fromkeys(HUB_MODELS, MODELS / "aligned")
    repositories |= {"openchat/openchat-3.5-0106": MODELS / "sft"}
    hub = WritableHub(repositories, accounts={TOKEN: Account()})
    server = hub.start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    for name in ("sft", "aligned", "step-100", "step-200"):
        shutil.copytree(MODELS / ("sft" if name == "sft" else "aligned"), tmp_path / name)
    (tmp_path / "spec.yml").write_text(blocks("yaml")[0])
    prompts = "".join(f'{{"prompt": "{word}"}}\n' for word in words(32, 99))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    asked = "".join(f'{{"question": "{w}", "answer": "ok {w}"}}\n' for w in words(8, 7))
    (tmp_path / "questions.jsonl").write_text(asked)
    (tmp_path / "texts.txt").write_text("ok world\nno gnome\num birds\nok plane\n")
    shutil.copytree(ROOT / "merge_configs", tmp_path / "merge_configs")
    write_benchmarks(tmp_path)
    (tmp_path / "rewards.py").write_text(blocks("python", EVALUATE)[0])
    return tmp_path


def write_benchmarks(folder: Path) -> None:
    """Prompts in three benchmarks' forms, and a task of lm-evaluation-harness."""
    words = ("hello", "world", "plane", "birds")
    rows: dict[str, list[dict]] = {
        "question.jsonl": [{"question_id": 81, "category": "writing", "turns": [*words[:2]]}],
        "judgement.jsonl": [{"word": w, "good": f"ok {w}", "bad": f"ok {w[::-1]}"} for w in words],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    alpaca = [{"dataset": "koala", "instruction": word} for word in words]
    (folder / "alpaca_eval.json").write_text(json.dumps(alpaca))
    task = {
        "task": "judgement",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "judgement.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{word}}",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "judgement.yaml").write_text(yaml.safe_dump(task))


def run(command: list[str], folder: Path, hub: Hub) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "0" if isinstance(hub, WritableHub) and hub.xet else "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def run_commands(text: str, workplace: Path, hub: Hub) -> int:
    """Run every line of the bash blocks; how many there were."""
    lines = [line for block in blocks("bash", text) for line in block.splitlines() if line.strip()]
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "expo", line
        run([sys.executable, "-m", *words], workplace, hub)
    return len(lines)


@pytest.mark.slow
def test_the_commands_of_the_low_rank_page(workplace: Path, hub: Hub) -> None:
    assert run_commands(LOW_RANK, workplace, hub) == 8
    assert (workplace / "unfrozen" / "axolotl.yml").exists()
    assert (workplace / "from-adapter" / "expo.json").exists()


@pytest.mark.slow
def test_the_commands_of_the_remote_page(workplace: Path, hub: Hub) -> None:
    from_hub, *_ = re.split(r"^## From an object store", REMOTE, flags=re.M)
    assert run_commands(from_hub, workplace, hub) == 3
    assert (workplace / "out" / "expo.json").exists()


@pytest.mark.slow
def test_the_commands_of_the_page_on_devices(workplace: Path, hub: Hub) -> None:
    text = (ROOT / "docs" / "devices.md").read_text()
    if not torch.cuda.is_available():
        text = text.replace("--device cuda", "--device cpu")
    assert run_commands(text, workplace, hub) == 3


@pytest.mark.slow
def test_the_commands_of_the_page_on_files(workplace: Path, hub: Hub) -> None:
    for name in ("sft", "aligned"):
        shutil.copy(MODELS / name / "model.safetensors", workplace / f"{name}.safetensors")
    assert run_commands((ROOT / "docs" / "files.md").read_text(), workplace, hub) == 6
    assert (workplace / "trial-alpha-1.3.safetensors.expo.json").exists()


@pytest.mark.slow
def test_the_commands_of_the_page_on_quantized_models(workplace: Path, hub: Hub) -> None:
    text = (ROOT / "docs" / "quantized.md").read_text()
    (workplace / "whole.yml").write_text(blocks("yaml", text)[0])
    for name in ("sft", "aligned"):
        config = json.loads((workplace / name / "config.json").read_text())
        shutil.copytree(workplace / name, workplace / f"{name}-fp8")
        codes = quantized(load_file(workplace / name / "model.safetensors"), (16, 16))
        section = FP8 | {"weight_block_size": [16, 16]}
        write_quantized(workplace / f"{name}-fp8", codes, section, config=config)
    assert run_commands(text, workplace, hub) == 6
    assert "quantization_config" not in (workplace / "whole" / "config.json").read_text()
    for name in ("out", "mixed", "whole"):
        checks = expo.info(workplace / name).verification or ()
        assert "pass" in {check.status for check in checks if check.name == "load"}
        assert not {check.status for check in checks} & {"error", "warning"}


@pytest.mark.slow
def test_the_commands_of_the_sweep_page(workplace: Path, hub: Hub) -> None:
    (linear,) = blocks("yaml", SWEEP)
    (workplace / "linear.yml").write_text(linear)
    assert run_commands(SWEEP, workplace, hub) == 5
    assert (workplace / "best" / "expo.json").exists()


@pytest.mark.slow
def test_the_snippet_of_the_sweep_page(workplace: Path, hub: Hub) -> None:
    (snippet,) = blocks("python", SWEEP)
    assert "aligned model" in run([sys.executable, "-c", snippet], workplace, hub)


@pytest.mark.slow
def test_the_commands_of_the_evaluation_page(workplace: Path, hub: Hub) -> None:
    (function,) = blocks("python", EVALUATE)
    (workplace / "judge.py").write_text(function)
    with serving(Chat()) as chat:
        text = EVALUATE.replace("http://localhost:8000/v1", chat.url)
        assert run_commands(text, workplace, hub) == 12
    (shown,) = map(json.loads, blocks("json", EVALUATE))
    written = json.loads((workplace / "aligned-results.json").read_text())
    for score in (*shown["results"], *written["results"]):
        score |= {"value": 0, "interval": 0, "source": ""}
    assert shown == written
    assert all(f"`{name}`" in EVALUATE for name in FORMATS)


@pytest.mark.slow
def test_the_commands_of_the_readme(workplace: Path, hub: WritableHub) -> None:
    log_in(workplace)
    assert run_commands(README, workplace, hub) >= 6
    assert (workplace / "delta.png").exists()
    assert (workplace / "starling-expo" / "expo.json").exists()
    assert "model.safetensors" in hub.repos["org/my-expo"].head()


@pytest.mark.slow
def test_the_snippets_of_the_readme(workplace: Path, hub: Hub) -> None:
    (snippet,) = blocks("python")
    assert len(run([sys.executable, "-c", snippet], workplace, hub).splitlines()) == 5


def test_the_line_of_the_readme_is_what_a_run_prints(workplace: Path, hub: Hub) -> None:
    command = ["expo", "extrapolate", "sft", "aligned", "out", "--alpha", "1.1", "-q"]
    printed = run([sys.executable, "-m", *command], workplace, hub)
    assert printed in "".join(blocks("text"))


def test_the_help_texts_of_the_docs() -> None:
    text = (ROOT / "docs" / "usage.md").read_text()
    documented = dict(
        re.findall(r"^## `expo ?([\w-]*)`\n\n```text\n(.*?)^```", text, flags=re.M | re.S)
    )
    assert documented.keys() == {"", *cli.commands}
    for name, shown in documented.items():
        arguments = [name, "--help"] if name else ["--help"]
        result = CliRunner().invoke(cli, arguments, prog_name="expo", terminal_width=80)
        assert shown == result.output, f"docs/usage.md is stale: python -m tests.test_docs ({name})"


def test_a_recipe_plans_by_name_from_the_hub(workplace: Path, hub: Hub) -> None:
    command = [sys.executable, "-m", "expo", "plan", "starling-lm-7b-beta-expo"]
    assert "21 extrapolated, 0 copied, 0 missing" in run(command, workplace, hub)


def log_in(folder: Path) -> None:
    """As `hf auth login` does."""
    (folder / "hf").mkdir()
    (folder / "hf" / "token").write_text(TOKEN)


@pytest.mark.slow
def test_the_publishing_page(workplace: Path) -> None:
    """The commands with Xet, then the snippet, which finds everything there."""
    hub = WritableHub(accounts={TOKEN: Account()}, xet=workplace / "cas")
    server = hub.start()
    log_in(workplace)
    text = (ROOT / "docs" / "publishing.md").read_text()
    assert run_commands(text, workplace, hub) == 5
    assert "model.safetensors" in hub.repos["org/my-push"].head()
    receipt = json.loads((workplace / "receipt.json").read_text())
    keys = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?)\|", text, flags=re.M))))
    assert keys == receipt.keys()
    (snippet,) = blocks("python", text)
    said = run([sys.executable, "-c", snippet], workplace, hub)
    server.shutdown()
    server.server_close()
    assert said == f"{receipt['url']} 0\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", blocks("yaml", METHODS + LOW_RANK), ids=lambda t: t.split()[1])
def test_the_specs_of_the_docs_run(
    text: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    (workplace / "own.yml").write_text(text)
    assert expo.merge("own.yml", "own", verify=False).out.name == "own"


def test_the_methods_in_the_docs_are_those_of_the_code() -> None:
    own = METHODS.partition("## mergekit's methods")[2].partition("## What runs")[0]
    named = {
        m
        for row in re.findall(r"^\| (`\w+`[^|]*)\|", own, flags=re.M)
        for m in re.findall(r"`(\w+)`", row)
    }
    assert named == METHOD_TABLE.keys() - {*NOT_IN_MERGEKIT}
    assert all(f"merge_method: {name}" in METHODS for name in NOT_IN_MERGEKIT)
    assert all(f"{{{name}: " in METHODS for name in TRANSFORMS)
    assert all(f"`{name}`" in METHODS for name in IN_MERGEKIT)


def test_the_table_of_checks_in_the_docs() -> None:
    assert (ROOT / "docs" / "verification.md").read_text().endswith(check_table())


def check_table() -> str:
    lines = [f"| `{c.name}` | {c.severity} | {c.claim or 'information only'} |" for c in CHECKS]
    return "\n".join(["| check | fails as | holds where it passes |", "|---|---|---|", *lines, ""])


def test_links_in_the_docs_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def write_help_texts() -> None:
    """Bring docs/usage.md up to date."""
    path = ROOT / "docs" / "usage.md"
    text = path.read_text()
    head = text[: text.index("## `expo`")]
    parts = []
    for name in ("", *sorted(cli.commands)):
        arguments = [name, "--help"] if name else ["--help"]
        shown = CliRunner().invoke(cli, arguments, prog_name="expo", terminal_width=80).output
        parts.append(f"## `expo{' ' if name else ''}{name}`\n\n```text\n{shown}```\n")
    path.write_text(head + "\n".join(parts))
    path = ROOT / "docs" / "verification.md"
    path.write_text(path.read_text().partition("| check |")[0] + check_table())


if __name__ == "__main__":
    write_help_texts()
