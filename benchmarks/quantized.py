"""What it costs to read codes: one pair in bfloat16, in FP8 and in MXFP4, merged into bfloat16.

    python -m benchmarks.quantized --params 1e9

The FP8 pair is the bfloat16 one in blocks of 128 × 128, the MXFP4 pair as many parameters in experts with the shapes of
gpt-oss, and its twin the same in bfloat16. Whole processes, not verified, interleaved, medians of `--runs`, page cache
warm; bytes that are read and written are said beside.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.merge import ALPHA, Measured, make_pair, measure, set_cache

BLOCK, ROWS, COLUMNS, EXPERTS = 128, 5760, 2880, 8


def coded(source: Path, folder: Path) -> Path:
    """A model with its projections in FP8."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        made: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(path).items():
            if "_proj" not in name:
                made[name] = tensor
                continue
            rows, columns = (size // BLOCK for size in tensor.shape)
            parts = tensor.float().view(rows, BLOCK, columns, BLOCK)
            scale = parts.abs().amax((1, 3), keepdim=True) / 448
            made[name] = (parts / scale).to(torch.float8_e4m3fn).view(tensor.shape)
            made[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        save_file(made, folder / path.name, metadata={"format": "pt"})
    _describe(folder, json.loads((source / "config.json").read_text()), {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})  # fmt: skip
    return folder


def experts(root: Path, name: str, parameters: float) -> tuple[Path, Path]:
    """(MXFP4, bfloat16) of one side: random codes, and what they stand for."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(len(name))
    folders = root / f"{name}-mxfp4", root / f"{name}-experts"
    for folder in folders:
        folder.mkdir()
    for layer in range(max(1, round(parameters / (EXPERTS * ROWS * COLUMNS)))):
        stem = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        shape = EXPERTS, ROWS, COLUMNS // 32
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(110, 120, shape, generator=generator).to(torch.uint8)
        file = f"{layer}.safetensors"
        save_file({f"{stem}_blocks": blocks, f"{stem}_scales": scales}, folders[0] / file)
        plain = torch.randn(EXPERTS, COLUMNS, ROWS, generator=generator).mul_(0.02).bfloat16()
        save_file({stem: plain}, folders[1] / file)
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    _describe(folders[0], config, {"quant_method": "mxfp4"})
    _describe(folders[1], config, {})
    return folders


def _describe(folder: Path, config: dict, section: dict) -> None:
    """The configuration and the index of what lies in a folder."""
    from safetensors import safe_open

    said = {"quantization_config": section} if section else {}
    (folder / "config.json").write_text(json.dumps(config | said))
    weight_map = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pairs(root: Path, parameters: float) -> Iterator[tuple[str, Path, Path]]:
    sft, aligned = make_pair(root, parameters)
    eight = coded(sft, root / "sft-fp8"), coded(aligned, root / "aligned-fp8")
    (four_sft, plain_sft), (four, plain) = (experts(root, n, parameters) for n in ("sft", "aligned"))  # fmt: skip
    yield "bfloat16", sft, aligned
    yield "FP8", *eight
    yield "SFT in bfloat16, aligned in FP8", sft, eight[1]
    yield "experts in bfloat16", plain_sft, plain
    yield "experts in MXFP4", four_sft, four


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=1e9)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the pairs [a temporary one]")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="expo-bench-", dir=options.folder))
    try:
        made = list(pairs(root, options.params))
        results: dict[str, list[Measured]] = {name: [] for name, *_ in made}
        for _ in range(options.runs):
            for name, sft, aligned in made:
                set_cache("warm", (sft, aligned))
                results[name].append(measure(name, _command(sft, aligned, root / "out")))
                written = _nbytes(root / "out")
                shutil.rmtree(root / "out")
                print(f"  {name}: {results[name][-1].wall:.2f} s, {written / 1e9:.2f} GB", file=sys.stderr)  # fmt: skip
        print("| pair | read GB | wall s: median (min – max) | CPU s | peak anon MB |\n|---|---|---|---|---|")  # fmt: skip
        for name, sft, aligned in made:
            print(_row(name, _nbytes(sft) + _nbytes(aligned), results[name]))
    finally:
        shutil.rmtree(root)


def _command(sft: Path, aligned: Path, out: Path) -> list[str]:
    words = [sys.executable, "-m", "expo", "extrapolate", sft, aligned, out, "--alpha", ALPHA]
    return [str(word) for word in (*words, "-q", "--no-verify", "--force")]


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _row(name: str, read: int, runs: list[Measured]) -> str:
    walls = [run.wall for run in runs]
    cpu = statistics.median(run.cpu for run in runs)
    spread = f"{statistics.median(walls):.2f} ({min(walls):.2f} – {max(walls):.2f})"
    return f"| {name} | {read / 1e9:.2f} | {spread} | {cpu:.2f} | {max(r.anonymous for r in runs) / 1e6:.0f} |"


if __name__ == "__main__":
    main()
