"""What bad input gets: one line that names it, with the cure; a code; and no OUT."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .conftest import CONFIG, Pair, Ran, nudged, write_checkpoint

Break = Callable[[Pair], None]


def _single(pair: Pair) -> Path:
    return pair.sft / "model.safetensors"


def _index(pair: Pair) -> Path:
    return pair.aligned / "model.safetensors.index.json"


def _edit_index(pair: Pair, edit: Callable[[dict], object]) -> None:
    index = json.loads(_index(pair).read_text())
    edit(index)
    _index(pair).write_text(json.dumps(index))


def _set(pair: Pair, name: str, value: torch.Tensor) -> None:
    write_checkpoint(pair.sft, pair.sft_tensors | {name: value})


def _bin(pair: Pair, content: object) -> None:
    _single(pair).unlink()
    torch.save(content, pair.sft / "pytorch_model.bin")


def _only(pair: Pair, *names: str) -> None:
    _single(pair).unlink()
    for name in names:
        (pair.sft / name).parent.mkdir(exist_ok=True)
        (pair.sft / name).write_bytes(b"x")


def _nan(pair: Pair, value: float) -> None:
    tensor = pair.sft_tensors["model.norm.weight"].clone()
    tensor[3] = value
    _set(pair, "model.norm.weight", tensor)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("/tmp/expo-was-run",)


CASES: dict[str, tuple[Break, str]] = {
    "truncated": (lambda p: os.truncate(_single(p), _single(p).stat().st_size - 1), "sft/model.safetensors is truncated: the header describes 3124 bytes, the file has 3123; download it again"),
    "trailing bytes": (lambda p: _single(p).write_bytes(_single(p).read_bytes() + b"x"), "sft/model.safetensors has trailing bytes"),
    "header larger than the file": (lambda p: _single(p).write_bytes((5000).to_bytes(8, "little") + b"{}"), "claims a header of 5000 bytes but the file has 10"),
    "empty file": (lambda p: _single(p).write_bytes(b""), "too short for a safetensors header"),
    "an LFS pointer": (lambda p: _single(p).write_text("version https://git-lfs.github.com/spec/v1\n"), "sft/model.safetensors is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"),
    "index points outside": (lambda p: _edit_index(p, lambda i: i["weight_map"].update({"lm_head.weight": "../sft/model.safetensors"})), "names a file that is no path below its folder: ../sft/model.safetensors"),
    "index points to the root": (lambda p: _edit_index(p, lambda i: i["weight_map"].update({"lm_head.weight": "/etc/passwd"})), "names a file that is no path below its folder: /etc/passwd"),
    "missing shard": (lambda p: (p.aligned / "model-00002-of-00003.safetensors").unlink(), "names model-00002-of-00003.safetensors, which is missing"),
    "index names a missing tensor": (lambda p: _edit_index(p, lambda i: i["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"})), "the index says ghost is in model-00001-of-00003.safetensors, it is not"),
    "index is not JSON": (lambda p: _index(p).write_text("{"), "is not JSON"),
    "index has no map": (lambda p: _index(p).write_text("{}"), "has no weight_map"),
    "config is not JSON": (lambda p: (p.sft / "config.json").write_text("{"), "sft/config.json is not JSON"),
    "missing tensor": (lambda p: _set(p, "only.here", torch.ones(2)), "1 tensor only in the SFT model (sft → aligned): only.here; --allow-missing REGEX drops them"),
    "shapes differ": (lambda p: _set(p, "model.norm.weight", torch.ones(9).bfloat16()), "model.norm.weight ([9] in SFT, [10] in aligned)"),
    "NaN": (lambda p: _nan(p, float("nan")), "model.norm.weight holds NaN or Inf in the SFT model"),
    "Inf": (lambda p: _nan(p, float("inf")), "model.norm.weight holds NaN or Inf in the SFT model"),
    "quantized by config": (lambda p: (p.sft / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq"}})), "sft is quantized (gptq), its codes cannot be added: name the unquantized original, or dequantize it first"),
    "quantized by name": (lambda p: _set(p, "model.layers.0.mlp.up_proj.qweight", torch.ones(2, dtype=torch.int32)), "is quantized (model.layers.0.mlp.up_proj.qweight is I32)"),
    "fp8": (lambda p: _set(p, "model.norm.weight", torch.ones(10).to(torch.float8_e4m3fn)), "is quantized (model.norm.weight is F8_E4M3)"),
    "complex": (lambda p: _set(p, "model.norm.weight", torch.ones(10, dtype=torch.complex64)), "model.norm.weight (C64 in SFT, BF16 in aligned)"),
    "pickle with code": (lambda p: _bin(p, {"w": Evil()}), "pytorch_model.bin holds more than tensors and could run code, refused"),
    "pickle with a number": (lambda p: _bin(p, {"w": torch.ones(1), "step": 5}), "pytorch_model.bin holds step, a int, beside its tensors"),
    "pickle of a list": (lambda p: _bin(p, [torch.ones(1)]), "holds a list, not a state dict"),
    "bin is no zip": (lambda p: _only(p, "pytorch_model.bin"), "pytorch_model.bin is damaged or in torch's format from before 1.6"),
    "strided": (lambda p: _bin(p, {"w": torch.ones(4, 5).t()}), "stores w transposed or strided"),
    "GGUF": (lambda p: _only(p, "model.gguf"), "holds GGUF weights, which expo does not read: name the safetensors original"),
    "DCP": (lambda p: _only(p, ".metadata", "__0_0.distcp"), "dcp_to_torch"),
    "ZeRO": (lambda p: _only(p, "zero_to_fp32.py"), "python zero_to_fp32.py DIR OUT"),
    "FSDP": (lambda p: _only(p, "pytorch_model_fsdp_0/__0_0.distcp"), "accelerate merge-weights"),
    "consolidated": (lambda p: _only(p, "consolidated.safetensors"), "original (consolidated) format"),
    "an adapter alone": (lambda p: _only(p, "adapter_model.safetensors"), "a LoRA adapter without its base, which expo does not read: write base+adapter"),
    "no weights": (lambda p: _single(p).unlink(), "holds no model.safetensors, model.safetensors.index.json or pytorch_model.bin"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    spoil, message = CASES[name]
    spoil(pair)
    out = tmp_path / "out"
    ran = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5, "-q")
    assert ran.code == 1
    assert ran.err.startswith("expo: ")
    assert len(ran.err.splitlines()) == 1
    assert message in ran.err
    assert ran.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "sft"]
    assert not Path("/tmp/expo-was-run").exists()


def test_debug_shows_the_traceback(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    _single(pair).unlink()
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err


def test_overflow_of_the_output_dtype_names_the_tensor(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    for rounding in ("nearest", "stochastic"):
        big = pair.aligned_tensors | {"lm_head.weight": torch.full((12, 10), 60_000.0).bfloat16()}
        write_checkpoint(pair.aligned, big)
        ran = expo(
            "extrapolate", pair.sft, pair.aligned, tmp_path / "out",
            "--alpha", 1.5, "--dtype", "float16", "--rounding", rounding,
        )  # fmt: skip
        assert ran.code == 1
        assert "lm_head.weight overflows F16 (its largest value is " in ran.err
        assert "use --dtype bfloat16 or float32" in ran.err
        assert not (tmp_path / "out").exists()


def test_overflow_of_a_copied_tensor_is_refused(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    write_checkpoint(pair.aligned, pair.aligned_tensors | {"extra": torch.full((3,), 1e5)})
    ran = expo(
        "extrapolate", pair.sft, pair.aligned, tmp_path / "out",
        "--alpha", 1.5, "--dtype", "float16", "--allow-missing", "extra",
    )  # fmt: skip
    assert ran.code == 1
    assert "extra overflows F16 (its largest value is 100000)" in ran.err


USAGE: dict[str, tuple[list[str], str]] = {
    "no alpha": ([], "give --alpha or --paper-alpha"),
    "both": (["--alpha", "1.5", "--paper-alpha", "0.5"], "give alpha or paper alpha, not both"),
    "between": (["--alpha", "0.3"], "--paper-alpha 0.3"),
    "not finite": (["--alpha", "nan"], "alpha must be a finite number"),
    "not a number": (["--alpha", "x"], "'x' is not a valid float"),
    "unknown flag": (["--alhpa", "1.5"], "No such option"),
    "unknown dtype": (["--alpha", "1.5", "--dtype", "fp8"], "'fp8' is not one of"),
    "bad size": (["--alpha", "1.5", "--max-shard-size", "5 apples"], "is not a size like 5GB"),
    "zero threads": (["--alpha", "1.5", "--threads", "0"], "not in the range"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors_exit_with_2(
    name: str, pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    flags, message = USAGE[name]
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", *flags)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_there(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    ran = expo("extrapolate", "./nowhere", tmp_path, tmp_path / "out", "--alpha", 1.5)
    assert ran.code == 2
    assert "SFT: ./nowhere is neither an existing directory nor a Hub id" in ran.err


def test_out_is_a_file(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    (tmp_path / "out").write_text("")
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5)
    assert ran.code == 1
    assert "is a file: name a directory" in ran.err


def test_plan_refuses_what_merge_would(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    ran = expo("plan", pair.sft, pair.aligned, "--out", tmp_path / "taken")
    assert ran.code == 1
    assert "refused" in ran.out
    assert "exists and is not empty" in ran.out
    write_checkpoint(pair.sft, nudged(pair.sft_tensors) | {"more": torch.ones(1)})
    ran = expo("plan", pair.sft, pair.aligned, "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["tensors"]["extra"] == ["more"]
    ran = expo("extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "--dry-run")
    assert ran.code == 1
    assert not (tmp_path / "out").exists()


def test_a_name_from_a_checkpoint_cannot_drive_the_terminal(
    pair: Pair, expo: Callable[..., Ran]
) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\u202egnp"
    save_file(pair.sft_tensors | {evil: torch.ones(1)}, _single(pair))
    ran = expo("plan", pair.sft, pair.aligned)
    assert ran.code == 1
    assert "\x1b" not in ran.out + ran.err
    assert "\u202e" not in ran.out + ran.err
