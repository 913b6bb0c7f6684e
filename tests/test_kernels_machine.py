"""What the kernels promise of processors and of the cache of machine code, each in its own process."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import expo

ROOT = Path(expo.__file__).parents[1]
SCRIPT = Path(__file__).with_name("kernel_digest.py")

LEVELS = {
    "x86-64": [],
    "x86-64-v3": ["avx2", "bmi2", "fma", "f16c", "movbe"],
    "x86-64-v4": ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
}


def run(folder: Path, *arguments: str, **variables: str) -> dict:
    """What the script prints when run on the package found in `folder`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))}
    environment = (
        inherited | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    )
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def levels() -> list[str]:
    """Those of this processor."""
    if platform.machine() != "x86_64":
        pytest.skip("not an x86 processor")
    has = set(Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    return [level for level, flags in LEVELS.items() if has.issuperset(flags)]


def same_on_all_levels(cache: Path, *arguments: str) -> None:
    said = [
        run(ROOT, *arguments, NUMBA_CACHE_DIR=str(cache / level), NUMBA_CPU_NAME=level,
            NUMBA_CPU_FEATURES="")
        for level in levels()
    ]  # fmt: skip
    assert all(one["multiplications"] > 0 for one in said)
    assert [one["fused"] for one in said] == [0] * len(said)
    assert all(one["digests"] == said[0]["digests"] for one in said)


@pytest.mark.slow
def test_bytes_and_sums_do_not_depend_on_the_processor(tmp_path: Path) -> None:
    same_on_all_levels(tmp_path, "few")


@pytest.mark.slow
def test_no_kernel_depends_on_the_processor(tmp_path: Path) -> None:
    same_on_all_levels(tmp_path)


def copy_of_the_package(folder: Path) -> Path:
    """The package where its modules keep their machine code beside them."""
    shutil.copytree(ROOT / "expo", folder / "expo", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "expo" / "compute"


def test_without_a_place_for_the_cache_kernels_are_compiled_each_time(tmp_path: Path) -> None:
    compute = copy_of_the_package(tmp_path)
    (
        compute / "__pycache__"
    ).touch()  # no modes, which root ignores: a file where a folder should be
    nowhere = str(compute / "__pycache__" / "home")
    said = run(tmp_path, "few", HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR=nowhere)
    assert said["digests"] == run(ROOT, "few")["digests"]


def test_kernels_load_neither_torch_nor_linear_algebra() -> None:
    assert run(ROOT, "few")["modules"] == []


@pytest.mark.slow
def test_a_cache_that_is_damaged_or_out_of_date_is_not_used(tmp_path: Path) -> None:
    compute = copy_of_the_package(tmp_path)
    first = run(tmp_path, "few")
    kept = list((compute / "__pycache__").glob("*.nb?"))
    assert kept
    for file in kept:
        file.write_bytes(b"")
    assert run(tmp_path, "few")["digests"] == first["digests"]
    bits = compute / "bits.py"
    bits.write_text(bits.read_text().replace("uint32(bits + uint32(0x7FFF) + odd)", "bits"))
    assert run(tmp_path, "few")["digests"] != first["digests"]
