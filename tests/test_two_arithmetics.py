"""The compiled arithmetic and torch's: which one runs, and that it does not matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import expo as door
from expo.compute.choice import arithmetic_for, needs_torch
from expo.planning.build import build_plan
from expo.spec.read import read_spec
from expo.spec.request import make_request

from .conftest import Pair, nudged, weights, write_checkpoint
from .test_merge import digest, load
from .test_one_formula import spec, three

_RUN = """
import json, sys
from expo.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(json.dumps([code or 0, [name for name in ("torch", "transformers", "numba") if name in sys.modules]]))
"""


def run(*words: object, before: Path | None = None, **environment: str) -> tuple[int, list[str]]:
    """The command line in a process of its own: its exit code, and which of the heavy packages it loaded."""
    known = dict(os.environ) | environment
    if before is not None:
        paths = [str(before), *filter(None, [known.get("PYTHONPATH")])]
        known["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", _RUN, *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True, env=known, check=False)
    assert ran.stdout, ran.stderr
    code, loaded = json.loads(ran.stdout.splitlines()[-1])
    return code, loaded


def test_the_main_job_loads_neither_torch_nor_transformers(pair: Pair, tmp_path: Path) -> None:
    words = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "--no-verify")
    assert run(*words) == (0, ["numba"])
    merged = door.extrapolate(pair.sft, pair.aligned, tmp_path / "again", alpha=1.5, verify=False)
    assert digest(tmp_path / "out") == digest(merged.out)


def test_without_numba_torch_gives_the_same_bytes_and_figures(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numba.py").write_text("raise ImportError('not for this NumPy')\n")
    words = ("--alpha", 1.5, "--no-verify", "--rounding", "stochastic")
    assert run("extrapolate", pair.sft, pair.aligned, tmp_path / "with", *words) == (0, ["numba"])
    code, loaded = run(
        "extrapolate",
        pair.sft,
        pair.aligned,
        tmp_path / "without",
        *words,
        before=tmp_path / "broken",
    )
    assert (code, loaded) == (0, ["torch"])
    assert digest(tmp_path / "with") == digest(tmp_path / "without")


def test_where_no_cache_can_be_kept_kernels_are_compiled_in_the_process(
    pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    words = ("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "--no-verify")
    assert run(*words, NUMBA_CACHE_DIR=str(tmp_path / "file" / "x")) == (0, ["numba"])
    merged = door.extrapolate(pair.sft, pair.aligned, tmp_path / "again", alpha=1.5, verify=False)
    assert digest(tmp_path / "out") == digest(merged.out)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "Compiled"), (torch.float16, "Compiled"), (torch.float64, "Plain")]
)  # fmt: skip
def test_each_dtype_has_its_arithmetic(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    sft = weights(dtype=dtype)
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", nudged(sft))
    request = make_request(str(tmp_path / "sft"), str(tmp_path / "aligned"), alpha=1.5)
    jobs = list(build_plan(request).jobs)
    assert {type(arithmetic_for(job)).__name__ for job in jobs} == {name}
    assert {needs_torch(job) for job in jobs} == {name == "Plain"}


def test_a_stack_of_matrices_is_ranked_as_the_operator_ranks_it(tmp_path: Path) -> None:
    """DELLA on three axes ranks along the second, as mergekit does: the torch path."""
    base, a, _ = three(tmp_path)
    for number, folder in enumerate((base, a)):
        held = load(folder)
        generator = torch.Generator().manual_seed(number)
        held["model.layers.0.mlp.experts"] = torch.randn(3, 8, 6, generator=generator).bfloat16()
        write_checkpoint(folder, held)
    asked = spec(base, a, transforms=[{"della": {"density": 0.4}}])
    jobs = {job.name: job for job in build_plan(read_spec(asked)).jobs}
    assert needs_torch(jobs["model.layers.0.mlp.experts"])
    assert not needs_torch(jobs["model.layers.0.mlp.up_proj.weight"])
    assert door.merge(asked, tmp_path / "out", verify=False).statistics.elements
