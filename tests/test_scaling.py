"""docs/scaling.md: its table is computed, its jobs are valid, and what they start runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.scaling import table

from .conftest import nudged, write_checkpoint

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text()
SPEC = """
merge_method: expo
base_model: sft
models:
  - model: aligned
    parameters: {alpha: 1.5}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


SLURM, _ = blocks("sh")
KUBERNETES, CLUSTER = map(yaml.safe_load, blocks("yaml"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tensors = {f"w{number}": torch.ones(4, 4) * number for number in range(16)}
    write_checkpoint(tmp_path / "sft", tensors, shards=16)
    write_checkpoint(tmp_path / "aligned", nudged(tensors), shards=16)
    (tmp_path / "spec.yml").write_text(SPEC)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "expo").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m expo "$@" --no-verify\n'
    )
    (tmp_path / "bin" / "expo").chmod(0o755)
    return tmp_path


def run(place: Path, command: list[str], **variables: str) -> str:
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}"} | variables
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_placed(place: Path) -> bool:
    return (place / "out" / "expo.json").exists() and not list(place.glob(".out*"))


def test_the_table_is_the_benchmarks() -> None:
    assert table() in PAGE


@pytest.mark.slow
def test_the_commands(place: Path) -> None:
    joined, shares = (block.splitlines() for block in blocks("bash"))
    run(place, shlex.split(joined[0]))
    assert is_placed(place)
    shutil.rmtree(place / "out")
    for line in shares:
        assert not (place / "out").exists()
        run(place, shlex.split(line, comments=True))
    assert is_placed(place)


@pytest.mark.slow
def test_the_slurm_array(place: Path) -> None:
    """As SLURM starts it: the script, once a task, each with variables of its own."""
    (place / "job.sh").write_text(SLURM)
    (numbers,) = re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", SLURM, flags=re.M)
    first, last = map(int, numbers)
    array = {"SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_STEP": "1",
             "SLURM_ARRAY_TASK_COUNT": str(last - first + 1), "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}  # fmt: skip
    for number in range(first, last + 1):
        assert not (place / "out").exists()
        run(place, ["bash", "job.sh"], **array, SLURM_ARRAY_TASK_ID=str(number))
    assert is_placed(place)


@pytest.mark.slow
def test_the_kubernetes_job(place: Path) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(KUBERNETES, "1.33", strict=True)
    (container,) = KUBERNETES["spec"]["template"]["spec"]["containers"]
    for index in range(KUBERNETES["spec"]["completions"]):
        assert not (place / "out").exists()
        run(place, container["command"], JOB_COMPLETION_INDEX=str(index))
    assert is_placed(place)


@pytest.mark.slow
def test_the_ray_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(CLUSTER))
