"""How fast a verification is, against reading the files.

    python -m benchmarks.verify --params 7.2e9

Makes one bfloat16 Mistral-shaped model with the OpenChat tokenizer, then runs all variants
interleaved, with a cold and a warm cache, and prints medians. Needs the test suite's packages.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.merge import make_model, set_cache
from tests.openchat import ROWS, write_tokenizer

_PASS = """
import sys, time
from pathlib import Path
from expo.checkpoint.files import open_directory
from expo.verification.subject import Subject
from expo.verification.tensors import read_tensors
import torch
subject = Subject(open_directory(Path(sys.argv[1])))
started = time.perf_counter()
read_tensors(subject)
print(time.perf_counter() - started)
"""


def variants(model: Path) -> dict[str, list[str]]:
    shell = ["bash", "-c"]
    read = "dd if=$f of=/dev/null bs=16M iflag=direct 2>/dev/null"
    return {
        "disk: direct read": [*shell, f"for f in {model}/*.safetensors; do {read}; done"],
        "disk: direct read, all shards at once": [
            *shell, f"for f in {model}/*.safetensors; do {read} & done; wait",
        ],
        "expo: tensor pass": [sys.executable, "-c", _PASS, str(model)],
        "expo verify": [sys.executable, "-m", "expo", "verify", str(model), "-q"],
        "expo verify --quick": [sys.executable, "-m", "expo", "verify", str(model), "-q", "--quick"],
    }  # fmt: skip


def measure(name: str, command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} failed with {done.returncode}: {done.stdout}{done.stderr}")
    return float(done.stdout) if name == "expo: tensor pass" else wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=1.2e9)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the model [a temporary one]")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="expo-bench-", dir=arguments.folder))
    try:
        model = make_model(root / "aligned", arguments.params, rows=ROWS)
        write_tokenizer(model)
        nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{nbytes / 1e9:.2f} GB of weights", flush=True)
        for cache in ("cold", "warm"):
            walls: dict[str, list[float]] = {}
            for _ in range(arguments.runs):
                for name, command in variants(model).items():
                    set_cache(cache, (model,))
                    walls.setdefault(name, []).append(measure(name, command))
                    print(f"  {cache} {name}: {walls[name][-1]:.2f} s", file=sys.stderr)
            print(
                f"\n{cache} cache\n\n| variant | wall s: median (min – max) | GB/s |\n|---|---|---|"
            )
            for name, runs in walls.items():
                median = statistics.median(runs)
                rate = "–" if name.endswith("--quick") else f"{nbytes / median / 1e9:.2f}"
                print(
                    f"| {name} | {median:.2f} ({min(runs):.2f} – {max(runs):.2f}) | {rate} |",
                    flush=True,
                )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
