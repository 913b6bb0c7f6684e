"""The pipelines of docs/publishing.md run as they stand there: the script by bash, the workflow step by step."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from expo.demo.toy import MODELS

from .hub_writing import Account, WritableHub
from .publishing import TOKEN

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "publishing.md").read_text()
REPO = "org/my-expo"
SPEC = """
merge_method: expo
base_model: org/sft
models:
  - model: org/aligned
    parameters: {alpha: 1.5}
"""
STEPS = ("plan", "merge", "verify", "card", "publish")
ACTIONS_BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")
"""How a runner starts `shell: bash`."""


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)
    return found


def workflow() -> dict:
    """YAML 1.1 takes `on` for true; GitHub does not."""
    return {"on" if key is True else key: v for key, v in yaml.safe_load(block("yaml")).items()}


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    hub = WritableHub(
        {"org/sft": MODELS / "sft", "org/aligned": MODELS / "aligned"},
        accounts={TOKEN: Account()},
    )
    server = hub.start()
    yield hub
    server.shutdown()
    server.server_close()


def machine(folder: Path, hub: WritableHub) -> dict[str, str]:
    """The environment of a machine that has nothing but expo, a spec and a cache of its own in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "spec.yml").write_text(SPEC)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GITHUB_"))}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
    }


def run_script(folder: Path, hub: WritableHub, *words: str) -> subprocess.CompletedProcess[str]:
    environment = machine(folder, hub) | {"HF_TOKEN": TOKEN}
    (folder / "publish.sh").write_text(block("shell"))
    return subprocess.run(
        ["bash", "publish.sh", *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def run_workflow(folder: Path, hub: WritableHub) -> list[str]:
    """Run its `run:` steps in order, each of them has to succeed; their names."""
    found = workflow()
    (job,) = found["jobs"].values()
    environment = machine(folder, hub) | found["env"]
    names = []
    for step in job["steps"]:
        if "run" in step:
            own = {
                k: v.replace("${{ secrets.HF_TOKEN }}", TOKEN)
                for k, v in step.get("env", {}).items()
            }
            done = subprocess.run(
                [*ACTIONS_BASH, step["run"]], cwd=folder, env=environment | own, capture_output=True, text=True
            )  # fmt: skip
            assert done.returncode == 0, (step["name"], done.stdout, done.stderr)
            names.append(step["name"])
    return names


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_script_is_bash_that_stops_at_the_first_failure() -> None:
    script = block("shell")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert [*re.findall(r"^expo (\w+)", script, flags=re.M)] == [*STEPS]


def test_the_workflow_is_one_that_github_reads() -> None:
    found = workflow()
    assert found.keys() <= {"name", "on", "permissions", "concurrency", "env", "defaults", "jobs"}
    assert found["on"].keys() == {"push", "workflow_dispatch"}
    assert found["permissions"] == {"contents": "read"}
    assert found["defaults"] == {"run": {"shell": "bash"}}
    (job,) = found["jobs"].values()
    assert job.keys() == {"runs-on", "steps"}
    for step in job["steps"]:
        assert step.keys() <= {"name", "uses", "with", "env", "run"}
        assert ("uses" in step) != ("run" in step)
    used = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
    assert used == ["actions/checkout", "actions/setup-python"]


def test_the_secret_reaches_the_steps_that_ask_the_hub_alone() -> None:
    """And no expression is pasted into a command."""
    found = workflow()
    (job,) = found["jobs"].values()
    runs = {step["name"]: step for step in job["steps"] if "run" in step}
    assert [name for name, step in runs.items() if "env" in step] == ["Plan", "Merge", "Publish"]
    assert not any("${{" in step["run"] for step in runs.values())
    assert set(re.findall(r"\${{.*?}}", block("yaml"))) == {"${{ secrets.HF_TOKEN }}"}


def test_the_script_passes_a_refusal_on(tmp_path: Path, hub: WritableHub) -> None:
    """The plan's, whose reason is in its JSON."""
    shutil.copytree(MODELS / "sft", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(tiny_file())
    (tmp_path / "refused.yml").write_text(SPEC.replace("org/sft", "./other"))
    done = run_script(tmp_path, hub, "refused.yml", "out", REPO)
    assert done.returncode == 1
    assert "no tensor is in both models" in done.stderr
    assert not (tmp_path / "out").exists()
    assert read(tmp_path / "out.steps" / "plan.json")["refusals"]
    assert run_script(tmp_path, hub, "nowhere.yml", "out", REPO).returncode == 2
    assert REPO not in hub.repos


def tiny_file() -> bytes:
    """Weights of no model."""
    import torch
    from safetensors.torch import save

    return save({"w": torch.ones(1)}, metadata={"format": "pt"})


@pytest.mark.slow
def test_the_script(tmp_path: Path, hub: WritableHub) -> None:
    done = run_script(tmp_path, hub, "spec.yml", "out", REPO, "apache-2.0")
    assert done.returncode == 0, done.stderr
    said = {name: read(tmp_path / "out.steps" / f"{name}.json") for name in STEPS}
    receipt = said["publish"]
    assert done.stdout == f"{receipt['url']}\n"
    assert receipt["commit"] == hub.repos[REPO].branches["main"]
    assert said["verify"]["ok"]
    assert {check["name"]: check["status"] for check in said["verify"]["checks"]}["keys"] == "pass"
    assert said["card"]["license"] == "apache-2.0"
    assert "expo-heatmap.png" in said["card"]["files"]


@pytest.mark.slow
def test_the_script_stops_where_the_model_does_not_verify(tmp_path: Path, hub: WritableHub) -> None:
    spec = f"{SPEC}verify: {{vectors: openchat}}\n"
    machine(tmp_path, hub)
    (tmp_path / "wrong.yml").write_text(spec)
    done = run_script(tmp_path, hub, "wrong.yml", "out", REPO, "apache-2.0")
    assert done.returncode == 3
    assert "\nvectors: the tokenizer has" in done.stderr
    assert (tmp_path / "out" / "expo.json").exists()
    assert REPO not in hub.repos


@pytest.mark.slow
def test_the_workflow(tmp_path: Path, hub: WritableHub) -> None:
    """The second runner comes to the same manifest, so it makes no commit."""
    names = run_workflow(tmp_path / "first", hub)
    assert [name.lower() for name in names if name.lower() in STEPS] == [*STEPS]
    first = read(tmp_path / "first" / "publish.json")
    assert first["commit"] == hub.repos[REPO].branches["main"]
    card = (tmp_path / "first" / "summary.md").read_text()
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card
    assert not any("weights" in path for path in (tmp_path / "first" / "hf").rglob("*.safetensors"))
    run_workflow(tmp_path / "second", hub)
    second = read(tmp_path / "second" / "publish.json")
    assert (second["commit"], second["bytes_sent"]) == (first["commit"], 0)
