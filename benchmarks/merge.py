"""How fast a merge is, against the disk, mergekit and the official script's method.

    python -m benchmarks.merge --params 1.2e9
    python -m benchmarks.merge --params 0.5e9 --only several
    python -m benchmarks.merge --params 7.2e9 --runs 1 --only floor,disk,expo,mergekit --caches cold

Makes a bfloat16 Mistral-shaped pair, then runs all variants interleaved, `--runs` rounds with a
warm and a cold cache, and prints medians. `expo: merge` is the merge itself, timed inside a process
that has imported everything; the other rows are whole processes. `several` is one merge at three α, in one pass
or in three runs one after the other.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ALPHA = 1.5
SEVERAL = ("1.2", "1.3", "1.5")

_EXPO = """
import json, sys, time
from pathlib import Path
import expo.compute.compiled
from expo.planning.build import build_plan
from expo.spec.request import make_request
from expo.verbs.running import run_plans
print("ready", flush=True)
started = time.perf_counter()
plan = build_plan(make_request(sys.argv[1], sys.argv[2], alpha=1.5))
planned = time.perf_counter()
run_plans([plan], [Path(sys.argv[3])])
print(json.dumps({"wall": time.perf_counter() - started, "plan": planned - started}))
"""

_OFFICIAL = """
import sys, torch
from transformers import AutoModelForCausalLM
sft, aligned = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16) for f in sys.argv[1:3])
with torch.no_grad():
    for one, zero in zip(aligned.state_dict().values(), sft.state_dict().values()):
        one.copy_(one + 0.5 * (one - zero))
aligned.save_pretrained(sys.argv[3])
"""

_MERGEKIT = """
merge_method: task_arithmetic
base_model: {sft}
models:
  - model: {aligned}
    parameters: {{weight: {alpha}}}
parameters: {{normalize: false}}
dtype: {dtype}
out_dtype: bfloat16
"""


@dataclass(frozen=True)
class Measured:
    """One run: seconds, CPU seconds, and the peak memory of its processes in bytes."""

    wall: float
    cpu: float
    anonymous: int
    file: int


def make_pair(root: Path, parameters: float) -> tuple[Path, Path]:
    """A pair with Mistral's shapes, in shards of at most 5 GB, ‖Δ‖ like a DPO run's."""
    return make_model(root / "sft", parameters), make_model(root / "aligned", parameters)


def make_model(folder: Path, parameters: float, *, rows: int = 32000) -> Path:
    """One side of the pair; the folder's name decides which."""
    import torch
    from safetensors.torch import save_file

    wide = parameters > 3e9
    hidden, inner, kv = (4096, 14336, 1024) if wide else (2048, 7168, 512)
    layer = {
        "input_layernorm": (hidden,), "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,), "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
    }  # fmt: skip
    size = sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max(1, round((parameters - 2 * rows * hidden) / size))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{n}.weight": shape for n, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": rows,
        "num_attention_heads": hidden // 128, "num_key_value_heads": kv // 128, "head_dim": 128,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    shards = _pack(shapes, 1e9 if not wide else 5e9)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _weight(name, shapes[name], noise, folder.name) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index_json = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    return folder


def _pack(shapes: dict[str, tuple[int, ...]], limit: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2
        for length in shape:
            nbytes *= length
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def _weight(name: str, shape: tuple[int, ...], noise, side: str):
    import torch

    count = torch.Size(shape).numel()
    values = torch.empty(count, dtype=torch.bfloat16)
    shift = sum(map(ord, name))
    for start in range(0, count, len(noise)):
        part = (noise.roll(shift + start)[: count - start] * 0.003).bfloat16()
        if side == "aligned":
            part = (part.float() + noise.roll(-shift)[: count - start] * 6.35e-6).bfloat16()
        values[start : start + len(part)] = part
    return values.view(shape)


def variants(
    sft: Path, aligned: Path, out: Path, scratch: Path, before: Path | None
) -> dict[str, list[str]]:
    """The command of every row; `before` is a checkout of an earlier version, to run beside."""
    python, shell = sys.executable, ["bash", "-c"]
    a, b = f"{aligned}/*.safetensors", f"{sft}/*.safetensors"
    commands = {
        "floor: cat + cp": [*shell, f"cat {a} {b} > /dev/null; cp -r {aligned} {out}; sync {out}/*"],
        "disk: direct read + write": [*shell, _direct(a, b, aligned, out)],
        "expo: merge": [python, "-c", _EXPO, sft, aligned, out],
        "expo: whole process": [
            python, "-m", "expo", "extrapolate", sft, aligned, out, "--alpha", ALPHA, "-q", "--no-verify",
        ],
        "expo: whole process, verified": [
            python, "-m", "expo", "extrapolate", sft, aligned, out, "--alpha", ALPHA, "-q",
        ],
    }  # fmt: skip
    if before is not None:
        earlier = [
            "env",
            "PYTHONSAFEPATH=1",
            f"PYTHONPATH={before}",
            *commands["expo: whole process"],
        ]
        commands["before: whole process"] = earlier
    whole = [python, "-m", "expo", "extrapolate", sft, aligned, out, "-q"]
    verified = {"": ["--no-verify"], ", verified": []}
    for name, how in verified.items():
        runs = ([*whole[:-2], f"{out}-{alpha}", "-q", "--alpha", alpha, *how] for alpha in SEVERAL)
        commands[f"several: one pass{name}"] = [*whole, "--alphas", ",".join(SEVERAL), *how]
        commands[f"several: a run each{name}"] = [
            *shell,
            " && ".join(" ".join(map(str, run)) for run in runs),
        ]
    for dtype in ("float32", "bfloat16"):
        spec = scratch / f"mergekit-{dtype}.yml"
        spec.write_text(_MERGEKIT.format(sft=sft, aligned=aligned, alpha=ALPHA, dtype=dtype))
        mergekit = Path(python).with_name("mergekit-yaml")
        commands[f"mergekit: task_arithmetic {dtype}"] = [mergekit, spec, out, "--quiet"]
    commands["official: transformers, bfloat16"] = [python, "-c", _OFFICIAL, sft, aligned, out]
    return {name: [str(part) for part in command] for name, command in commands.items()}


def _direct(a: str, b: str, aligned: Path, out: Path) -> str:
    count = sum(path.stat().st_size for path in aligned.glob("*.safetensors")) // (8 << 20)
    read = f"for f in {a} {b}; do dd if=$f of=/dev/null bs=8M iflag=direct 2>/dev/null; done"
    write = f"dd if=/dev/zero of={out} bs=8M count={count} oflag=direct conv=fsync 2>/dev/null"
    return f"({read}) & {write} & wait"


def measure(name: str, command: list[str]) -> Measured:
    """Run one command to its end, watching its memory."""
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    peak = _Peak(process.pid)
    out, _ = process.communicate()
    wall = time.perf_counter() - started
    peak.stop()
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{name} failed with {process.returncode}")
    if name.startswith("expo: merge"):
        wall = json.loads(out.splitlines()[-1])["wall"]
    cpu = sum(after[2:4]) - sum(before[2:4])
    return Measured(wall, cpu, peak.anonymous, peak.file)


class _Peak:
    """Samples a process and its children."""

    def __init__(self, pid: int) -> None:
        self._pid, self.anonymous, self.file = pid, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            totals = [_memory(pid) for pid in _family(self._pid)]
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in totals))
            self.file = max(self.file, sum(file for _, file in totals))


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    anonymous, file = (values.get(key, "0 kB").split()[0] for key in ("RssAnon", "RssFile"))
    return int(anonymous) << 10, int(file) << 10


def set_cache(cache: str, folders: tuple[Path, ...]) -> None:
    """Read the inputs into the page cache, or drop them from it."""
    os.sync()
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            fd = os.open(path, os.O_RDONLY)
            if cache == "cold":
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(fd, 1 << 24):
                    pass
            os.close(fd)


def bare_torch() -> int:
    """Anonymous memory of a process that only imports torch."""
    code = "import torch; print(open('/proc/self/status').read())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return next(int(line.split()[1]) << 10 for line in out.stdout.splitlines() if "RssAnon" in line)


def report(results: dict[str, list[Measured]]) -> str:
    """A Markdown table; the ratio is of expo's whole process to the row, for the merge to floors."""
    median = {name: statistics.median(m.wall for m in runs) for name, runs in results.items()}
    lines = [
        "| variant | wall s: median (min – max) | CPU s | peak anon MB | peak file MB "
        "| wall / expo merge | wall / expo process |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        walls = [m.wall for m in runs]
        cpu = statistics.median(m.cpu for m in runs)
        anonymous, file = (max(getattr(m, k) for m in runs) / 1e6 for k in ("anonymous", "file"))
        ratios = [
            f"{median[name] / median[other]:.2f}" if other in median else "–"
            for other in ("expo: merge", "expo: whole process")
        ]
        lines.append(
            f"| {name} | {median[name]:.2f} ({min(walls):.2f} – {max(walls):.2f}) | {cpu:.2f} "
            f"| {anonymous:.0f} | {file:.0f} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=1.2e9)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="comma-separated beginnings of variants")
    parser.add_argument("--caches", default="warm,cold")
    parser.add_argument(
        "--before", type=Path, help="a checkout of an earlier version to run beside"
    )
    parser.add_argument("--folder", type=Path, help="where to make the pair [a temporary one]")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="expo-bench-", dir=arguments.folder))
    try:
        sft, aligned = make_pair(root, arguments.params)
        moved = 3 * sum(path.stat().st_size for path in aligned.glob("*.safetensors"))
        chosen = {
            name: command
            for name, command in variants(
                sft, aligned, root / "out", root, arguments.before
            ).items()
            if any(name.startswith(start) for start in arguments.only.split(","))
        }
        print(f"{arguments.params:.2g} parameters, {moved / 1e9:.2f} GB moved, "
              f"bare import torch {bare_torch() / 1e6:.0f} MB anonymous", flush=True)  # fmt: skip
        for cache in arguments.caches.split(","):
            results: dict[str, list[Measured]] = {name: [] for name in chosen}
            for _ in range(arguments.runs):
                for name, command in chosen.items():
                    if name == "mergekit: task_arithmetic bfloat16" and results[name]:
                        continue  # once is enough to show it
                    set_cache(cache, (sft, aligned))
                    results[name].append(measure(name, command))
                    for made in root.glob("out*"):
                        _remove(made)
                    print(f"  {cache} {name}: {results[name][-1].wall:.2f} s", file=sys.stderr)
            print(f"\n{cache} cache, {arguments.runs} runs\n\n{report(results)}", flush=True)
    finally:
        shutil.rmtree(root)


def _remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
