"""How fast a verification is, against reading the files.

    python -m benchmarks.verify --params 7.2e9
    python -m benchmarks.verify --params 1e9 --against
    python -m benchmarks.verify --experts --before ../an-earlier-checkout

Makes a bfloat16 Mistral-shaped model (or a pair) with the OpenChat tokenizer, or with `--experts` a pair of
7,203 small tensors, then runs all variants interleaved, with a cold and a warm cache, and prints medians of wall
and CPU seconds (of all processes). Needs the test suite's packages.
"""

import argparse
import json
import os
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
_LAYERS, _EXPERTS, _HIDDEN = 48, 48, 64
Commands = dict[str, list[str]]


def alone(model: Path) -> Commands:
    shell = ["bash", "-c"]
    read = "dd if=$f of=/dev/null bs=16M iflag=direct 2>/dev/null"
    return {
        "disk: direct read": [*shell, f"for f in {model}/*.safetensors; do {read}; done"],
        "disk: direct read, all shards at once": [
            *shell, f"for f in {model}/*.safetensors; do {read} & done; wait",
        ],
        "expo: tensor pass": [sys.executable, "-c", _PASS, str(model)],
        "expo verify": _expo("verify", model),
        "expo verify --quick": _expo("verify", model, "--quick"),
    }  # fmt: skip


def of_pair(out: Path, aligned: Path) -> Commands:
    return {
        "read both: cat": ["bash", "-c", f"cat {out}/*.safetensors {aligned}/*.safetensors >/dev/null"],
        "expo verify": _expo("verify", out),
        "expo verify --against": _expo("verify", out, "--against", aligned),
    }  # fmt: skip


def of_experts(out: Path, sft: Path, aligned: Path) -> Commands:
    merge = _expo("extrapolate", sft, aligned, out.with_name("again"), "--alpha", "1.5")
    return {
        "merge --no-verify": [*merge, "--overwrite", "--no-verify"],
        "merge": [*merge, "--overwrite"],
        "verify --quick": _expo("verify", out, "--quick"),
        "verify --against": _expo("verify", out, "--against", aligned),
    }


def _expo(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "expo", *map(str, arguments), "-q"]


def make_experts(folder: Path) -> Path:
    """A mixture of experts of 7,203 tensors, 66 MB; its numbers differ with the folder's name."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    folder.mkdir(parents=True)
    square = (_HIDDEN, _HIDDEN)
    layer = {f"self_attn.{n}_proj": square for n in "qo"} | {"input_layernorm": (_HIDDEN,)}
    layer |= {f"self_attn.{n}_proj": (_HIDDEN // 2, _HIDDEN) for n in "kv"}
    layer |= {"mlp.gate": (_EXPERTS, _HIDDEN)}
    layer |= {
        f"mlp.experts.{e}.{n}_proj": square for e in range(_EXPERTS) for n in ("gate", "up", "down")
    }
    shapes = {f"model.layers.{n}.{k}.weight": v for n in range(_LAYERS) for k, v in layer.items()}
    shapes |= {f"{name}.weight": (ROWS, _HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    shapes |= {"model.norm.weight": (_HIDDEN,)}
    tensors = {
        n: (torch.randn(s, generator=generator) * 0.02).bfloat16() for n, s in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=ROWS, hidden_size=_HIDDEN, moe_intermediate_size=_HIDDEN,
        num_hidden_layers=_LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=_HIDDEN // 4,
        num_experts=_EXPERTS, num_experts_per_tok=2,
    ).to_dict()  # fmt: skip
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", "eos_token_id": 32000}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def measure(name: str, command: list[str], place: Path) -> tuple[float, float]:
    """Wall and CPU seconds; 3 is the exit code of a model that does not verify."""
    began, started = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    wall, ended = time.perf_counter() - started, os.times()
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name} failed with {done.returncode}: {done.stdout}{done.stderr}")
    cpu = sum(ended[2:4]) - sum(began[2:4])
    return (float(done.stdout) if name == "expo: tensor pass" else wall), cpu


def commands(arguments: argparse.Namespace, root: Path) -> tuple[Commands, tuple[Path, ...]]:
    """What is measured, and the folders that it reads."""
    if not (arguments.against or arguments.experts):
        model = make_model(root / "aligned", arguments.params, rows=ROWS)
        write_tokenizer(model)
        return alone(model), (model,)
    sides = []
    for side in ("sft", "aligned"):
        if arguments.experts:
            sides.append(make_experts(root / side))
        else:
            sides.append(make_model(root / side, arguments.params, rows=ROWS))
            write_tokenizer(sides[-1])
    sft, aligned = sides
    out = root / "out"
    merge = _expo("extrapolate", sft, aligned, out, "--alpha", "1.5", "--no-verify")
    subprocess.run(merge, check=True, capture_output=True)
    if arguments.experts:
        return of_experts(out, sft, aligned), (out, aligned)
    return of_pair(out, aligned), (out, aligned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=1.2e9)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--against", action="store_true", help="a pair, one against the other")
    parser.add_argument("--experts", action="store_true", help="a pair of 7,203 tensors")
    parser.add_argument("--caches", nargs="+", default=["cold", "warm"])
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version, run beside")
    parser.add_argument("--folder", type=Path, help="where to make the model [a temporary one]")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    places = {"": here} | ({", before": arguments.before.resolve()} if arguments.before else {})
    root = Path(tempfile.mkdtemp(prefix="expo-bench-", dir=arguments.folder))
    try:
        variants, folders = commands(arguments, root)
        nbytes = sum(f.stat().st_size for folder in folders for f in folder.glob("*.safetensors"))
        print(f"{nbytes / 1e9:.2f} GB of weights", flush=True)
        for cache in arguments.caches:
            found: dict[str, list[tuple[float, float]]] = {}
            for _ in range(arguments.runs):
                for name, command in variants.items():
                    for suffix, place in places.items() if "expo" in command else [("", here)]:
                        set_cache(cache, folders)
                        times = measure(name, command, place)
                        found.setdefault(name + suffix, []).append(times)
                        print(f"  {cache} {name}{suffix}: {times[0]:.2f} s", file=sys.stderr)
            print(
                f"\n{cache} cache\n\n| variant | wall s: median (min – max) | CPU s |\n|---|---|---|"
            )
            for name, runs in found.items():
                walls, cpus = zip(*runs, strict=True)
                spread = f"{statistics.median(walls):.2f} ({min(walls):.2f} – {max(walls):.2f})"
                print(f"| {name} | {spread} | {statistics.median(cpus):.2f} |", flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
