"""How fast other methods are, against mergekit: whole processes, warm, interleaved.

    python -m benchmarks.methods --params 1.2e9 --runs 3

Three bfloat16 Mistral-shaped models; both sides write bfloat16, mergekit computes in float32 too.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.merge import make_model, measure, set_cache


def specs(root: Path) -> dict[str, dict]:
    base, a, b = (str(root / name) for name in ("sft", "aligned", "third"))
    dtypes = {"dtype": "float32", "out_dtype": "bfloat16"}

    def models(**parameters: float) -> list[dict]:
        return [{"model": model, "parameters": parameters} for model in (a, b)]

    return {
        "linear": {"merge_method": "linear", "models": models(weight=0.5)} | dtypes,
        "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": base, "models": models(weight=0.5)} | dtypes,
        "ties": {"merge_method": "ties", "base_model": base, "models": models(weight=0.5, density=0.5)} | dtypes,
        "dare_ties": {"merge_method": "dare_ties", "base_model": base, "models": models(weight=0.5, density=0.5)} | dtypes,
        "slerp": {"merge_method": "slerp", "base_model": a, "models": [{"model": b}], "parameters": {"t": 0.5}} | dtypes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=1.2e9)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the models [a temporary one]")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="expo-bench-", dir=arguments.folder))
    folders = tuple(root / name for name in ("sft", "aligned", "third"))
    try:
        for folder in folders:
            make_model(folder, arguments.params)
        print(
            "| method | expo s | mergekit s | ratio | expo peak anon MB | mergekit |\n|---|---|---|---|---|---|"
        )
        for name, spec in specs(root).items():
            (root / "spec.yml").write_text(json.dumps(spec))
            out = root / "out"
            mergekit = str(Path(sys.executable).with_name("mergekit-yaml"))
            commands = {
                "expo": [sys.executable, "-m", "expo", "merge", str(root / "spec.yml"), str(out), "-q", "--no-verify"],
                "mergekit": [mergekit, str(root / "spec.yml"), str(out), "--quiet"],
            }  # fmt: skip
            runs = {side: [] for side in commands}
            for _ in range(arguments.runs):
                for side, command in commands.items():
                    set_cache("warm", folders)
                    runs[side].append(measure(side, command))
                    shutil.rmtree(out)
            wall = {side: statistics.median(m.wall for m in found) for side, found in runs.items()}
            peak = {side: max(m.anonymous for m in found) / 1e6 for side, found in runs.items()}
            print(
                f"| {name} | {wall['expo']:.2f} | {wall['mergekit']:.2f} | "
                f"{wall['mergekit'] / wall['expo']:.1f} | {peak['expo']:.0f} | {peak['mergekit']:.0f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
