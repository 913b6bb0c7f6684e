"""How long a plan takes at the size of DeepSeek-V3, from headers alone.

    python -m benchmarks.plan

Makes pairs of directories of 671 B parameters whose files are headers and holes: 46,000 tensors in 163 shards a side,
named and shaped as DeepSeek-V3's, which take a few megabytes of disk: in bfloat16, and in FP8 as it is published, where
nearly every tensor has its scales beside it. `expo plan` and `expo verify --quick` are whole processes, medians of
`--runs`, with the largest resident memory. The journal and the manifest are those that a merge of this size would leave,
with made-up sums: what entering all shards, resuming from them, and writing and reading the manifest take by themselves.
"""

import argparse
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HIDDEN, LAYERS, DENSE, EXPERTS, VOCABULARY, SHARDS = 7168, 61, 3, 256, 129_280, 163
EXPERT, MLP, Q_RANK, KV_RANK, ROPE, HEADS, HEAD = 2048, 18_432, 1536, 512, 64, 128, 128

Shape = tuple[int, ...]
Stored = tuple[str, Shape]
"""dtype and shape"""

BLOCK = 128
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def tensors() -> Iterator[tuple[str, Shape]]:
    """Names and shapes of every tensor, in the order of the layers."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in _layer(layer))
        if layer >= DENSE:
            yield f"model.layers.{layer}.mlp.gate.e_score_correction_bias", (EXPERTS,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _layer(layer: int) -> Iterator[tuple[str, Shape]]:
    yield "input_layernorm", (HIDDEN,)
    yield "post_attention_layernorm", (HIDDEN,)
    yield "self_attn.q_a_proj", (Q_RANK, HIDDEN)
    yield "self_attn.q_a_layernorm", (Q_RANK,)
    yield "self_attn.q_b_proj", (HEADS * (HEAD + ROPE), Q_RANK)
    yield "self_attn.kv_a_proj_with_mqa", (KV_RANK + ROPE, HIDDEN)
    yield "self_attn.kv_a_layernorm", (KV_RANK,)
    yield "self_attn.kv_b_proj", (HEADS * 2 * HEAD, KV_RANK)
    yield "self_attn.o_proj", (HIDDEN, HEADS * HEAD)
    if layer < DENSE:
        yield from _mlp("mlp", MLP)
        return
    yield "mlp.gate", (EXPERTS, HIDDEN)
    yield from _mlp("mlp.shared_experts", EXPERT)
    for expert in range(EXPERTS):
        yield from _mlp(f"mlp.experts.{expert}", EXPERT)


def _mlp(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj", (width, HIDDEN)
    yield f"{name}.up_proj", (width, HIDDEN)
    yield f"{name}.down_proj", (HIDDEN, width)


def stored(*, fp8: bool) -> Iterator[tuple[str, Stored]]:
    """The tensors as they lie in files: of matrices of the layers, but the router's, codes and then scales."""
    for name, shape in tensors():
        if not fp8 or "_proj" not in name:
            yield name, ("BF16", shape)
            continue
        yield name, ("F8_E4M3", shape)
        yield f"{name}_scale_inv", ("F32", tuple(-(-size // BLOCK) for size in shape))


def make_model(folder: Path, *, fp8: bool) -> int:
    """The model in `folder`; how many tensors it has."""
    folder.mkdir()
    every = list(stored(fp8=fp8))
    whole = sum(map(_nbytes, (one for _, one in every)))
    weight_map, shard, held, number = {}, {}, 0, 1
    for name, one in every:
        shard[name] = one
        held += _nbytes(one)
        weight_map[name] = f"model-{number:05}-of-{SHARDS:06}.safetensors"
        if held * SHARDS >= whole * number or name == every[-1][0]:
            _write_shard(folder / weight_map[name], shard)
            shard, number = {}, number + 1
    index = {"metadata": {"total_size": whole}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_CONFIG | (_FP8 if fp8 else {})))
    return len(every)


def _nbytes(one: Stored) -> int:
    return ITEM_BYTES[one[0]] * math.prod(one[1])


def _write_shard(path: Path, held: dict[str, Stored]) -> None:
    at, header = 0, {}
    for name, (dtype, shape) in held.items():
        end = at + _nbytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + at)


_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE, "n_routed_experts": EXPERTS,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": EXPERT, "intermediate_size": MLP,
    "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "qk_rope_head_dim": ROPE, "qk_nope_head_dim": HEAD, "v_head_dim": HEAD,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "n_group": 8, "topk_group": 4,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip


_FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                "weight_block_size": [BLOCK, BLOCK]}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the models [a temporary one]")
    options = parser.parse_args()
    for fp8 in (False, True):
        with tempfile.TemporaryDirectory(dir=options.folder) as made:
            _measure(Path(made), options.runs, fp8=fp8)


def _measure(folder: Path, runs: int, *, fp8: bool) -> None:
    sft, aligned, out = (folder / name for name in ("sft", "aligned", "out"))
    count = make_model(sft, fp8=fp8)
    make_model(aligned, fp8=fp8)
    _move(aligned)
    print(f"{'FP8' if fp8 else 'bfloat16'}: {count} tensors a side")
    commands = {
        "expo plan": ["plan", str(sft), str(aligned), "--alpha", "1.5", "--out", str(out)],
        "expo plan --json": ["plan", str(sft), str(aligned), "--alpha", "1.5", "--json"],
        "expo verify --quick": ["verify", str(sft), "--quick"],
    }
    for name, words in commands.items():
        measured = [_run(words) for _ in range(runs)]
        wall, cpu, memory = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{name}: {wall:.1f} s, {cpu:.1f} CPU s, {memory / 1e9:.2f} GB", flush=True)
    if not fp8:
        command = [sys.executable, "-c", _RECORDS, str(sft), str(aligned), str(out)]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="")


_RECORDS = """
import os, random, sys, time
from pathlib import Path
from expo.output.journal import fingerprint, identities
from expo.output.manifest import Manifest
from expo.output.sink import FinishedShard
from expo.output.staging import Staging
from expo.operators.statistics import Sample, Sums
from expo.planning.build import build_plan
from expo.spec.request import make_request
from expo.verbs.manifests import streamed_manifest

def timed(what, work):
    started = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - started:.1f} s", flush=True)
    return result

plan = build_plan(make_request(sys.argv[1], sys.argv[2], alpha=1.5))
known = identities(plan)
print_ = fingerprint(plan, known)
draw = random.Random(0).random
shards = [
    FinishedShard(
        shard.file, shard.file_bytes, "0" * 64,
        {job.name: Sums(job.count, *(draw() for _ in range(9))) for job in shard.jobs},
        {job.name: Sample(*(draw() for _ in range(4))) for job in shard.jobs},
    )
    for shard in plan.shards
]
with Staging(Path(sys.argv[3])) as staging:
    staging.resume(print_)
    for shard in shards:
        path = staging.folder / shard.file
        path.touch()
        os.truncate(path, shard.file_bytes)
    timed("journal, all shards entered", lambda: [staging._journal.append(shard) for shard in shards])
    size = (staging.folder / "journal.jsonl").stat().st_size
    done, _ = timed(f"journal of {size / 1e6:.0f} MB, resumed", lambda: staging.resume(print_))
    manifest = timed("manifest, made", lambda: streamed_manifest(plan, print_.digest, known, done, {}))
    text = timed("manifest, to JSON", manifest.to_json)
    timed(f"manifest of {len(text) / 1e6:.0f} MB, read", lambda: Manifest.from_json(text))
"""


def _move(folder: Path) -> None:
    """Change the first value, as training does: equal models are compared tensor by tensor, and warned of."""
    with min(folder.glob("*.safetensors")).open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + header_bytes)
        file.write(b"\x80\x3f")


def _run(words: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and the largest resident memory in bytes of one process, without its children."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "expo", *words], stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # what wait4 has taken
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - started, cpu, 1024.0 * usage.ru_maxrss


if __name__ == "__main__":
    main()
