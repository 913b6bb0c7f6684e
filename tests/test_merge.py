"""Whole merges on small checkpoints, compared with the naive way and byte by byte."""

import hashlib
import itertools
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expo as door
from expo.compute.stream import Tuning
from expo.planning.build import build_plan
from expo.spec.request import make_request

from .conftest import (
    CONFIG,
    Pair,
    Ran,
    Tensors,
    extrapolate,
    nudged,
    run_plan,
    weights,
    write_checkpoint,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def naive(sft: Tensors, aligned: Tensors, alpha: float) -> Tensors:
    """Both models whole, in memory, in the contract's three steps."""
    result = {}
    for name, a in aligned.items():
        working = torch.float64 if torch.float64 in (a.dtype, sft[name].dtype) else torch.float32
        wide, base = a.to(working), sft[name].to(working)
        result[name] = (wide + (wide - base) * (alpha - 1.0)).to(a.dtype)
    return result


def assert_same(result: Tensors, expected: Tensors) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype, name
        assert torch.equal(result[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("alpha", [1.5, 1.3, -0.5, 4.0])
def test_the_output_is_the_naive_one(pair: Pair, tmp_path: Path, alpha: float) -> None:
    extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=alpha)
    assert_same(load(tmp_path / "out"), naive(pair.sft_tensors, pair.aligned_tensors, alpha))


@pytest.mark.parametrize(("mine", "theirs"), list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(tmp_path: Path, mine: torch.dtype, theirs: torch.dtype) -> None:
    wide = weights(0, torch.float64)
    sft = {name: tensor.to(mine) for name, tensor in wide.items()}
    aligned = {name: tensor.to(theirs) for name, tensor in nudged(wide).items()}
    write_checkpoint(tmp_path / "sft", sft, shards=2)
    write_checkpoint(tmp_path / "aligned", aligned)
    for dtype in (None, "bfloat16", "float16", "float32", "float64"):
        out = tmp_path / f"out-{dtype}"
        extrapolate(tmp_path / "sft", tmp_path / "aligned", out, alpha=1.5, dtype=dtype)
        for name, tensor in load(out).items():
            assert tensor.dtype == (getattr(torch, dtype) if dtype else theirs)
            exact = sft[name].double() + 1.5 * (aligned[name].double() - sft[name].double())
            working = torch.float64 if torch.float64 in (mine, theirs) else torch.float32
            eps = max(torch.finfo(tensor.dtype).eps / 2, 2 * torch.finfo(working).eps)
            tiny = 2 * float(torch.finfo(tensor.dtype).smallest_normal) * eps + 1e-9
            assert torch.all((tensor.double() - exact).abs() <= exact.abs() * eps * 1.01 + tiny), (
                name
            )


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_0_and_1_copy(pair: Pair, tmp_path: Path, alpha: float) -> None:
    extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=alpha, rounding="stochastic")
    assert_same(load(tmp_path / "out"), pair.aligned_tensors if alpha else pair.sft_tensors)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bytes_do_not_depend_on_threads_or_chunks(tmp_path: Path, rounding: str) -> None:
    sft = weights(0)
    sft["odd"] = torch.randn(5, 7, 3).bfloat16()
    sft["flags"] = torch.tensor([True, False, True])  # shifts what follows to an odd offset
    sft["zero_rows"] = torch.empty(0, 4, dtype=torch.bfloat16)
    sft["scalar"] = torch.tensor(0.5, dtype=torch.bfloat16)
    aligned = {n: (t if t.dtype == torch.bool else nudged({n: t})[n]) for n, t in sft.items()}
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", aligned, shards=2)
    request = make_request(
        str(tmp_path / "sft"), str(tmp_path / "aligned"), alpha=1.3, rounding=rounding, seed=3
    )
    seen = set()
    tunings = [
        Tuning(threads=threads, chunk_bytes=chunk, block_elements=block)
        for threads in (1, 2, 4)
        for chunk, block in ((2, 1), (64, 7), (4096, 128), (1 << 24, 131_072))
    ]
    for number, tuning in enumerate(tunings):
        out = tmp_path / f"out{number}"
        run_plan(build_plan(request), out, tuning=tuning)
        files = digest(out)
        seen.add(tuple(sorted((n, h) for n, h in files.items() if n.endswith(".safetensors"))))
    assert len(seen) == 1


def test_statistics_do_not_depend_on_threads_or_chunks(tmp_path: Path) -> None:
    sft = {"w": (torch.randn(700, 1000) * 0.02).bfloat16()}
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", nudged(sft))
    request = make_request(str(tmp_path / "sft"), str(tmp_path / "aligned"), alpha=1.3)
    manifests = []
    for number, tuning in enumerate(
        [
            Tuning(threads=1),
            Tuning(threads=4, chunk_bytes=1),
            Tuning(threads=2, chunk_bytes=1 << 30),
        ]
    ):
        run_plan(build_plan(request), tmp_path / f"out{number}", tuning=tuning)
        manifests.append((tmp_path / f"out{number}" / "expo.json").read_bytes())
    assert len(set(manifests)) == 1


def test_statistics_match_float64(pair: Pair, tmp_path: Path) -> None:
    result = extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.3)
    out = load(tmp_path / "out")
    flat = {
        name: torch.cat([t.double().flatten() for _, t in sorted(tensors.items())])
        for name, tensors in (("s", pair.sft_tensors), ("a", pair.aligned_tensors), ("o", out))
    }
    delta, moved = flat["a"] - flat["s"], flat["o"] - flat["s"]
    total = result.statistics
    assert total.elements == delta.numel()
    assert total.effective_alpha == pytest.approx(float(moved @ delta / (delta @ delta)), rel=1e-5)
    noise = (moved - 1.3 * delta).norm() / (1.3 * delta).norm()
    assert total.rounding_noise == pytest.approx(float(noise), rel=1e-3)
    assert total.zero_share == pytest.approx(float((delta == 0).double().mean()))
    assert total.unmoved_share == pytest.approx(float((flat["o"] == flat["a"]).double().mean()))
    assert total.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert total.delta_rms == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-6)
    assert total.relative_delta == pytest.approx(float(delta.norm() / flat["s"].norm()), rel=1e-6)
    assert set(result.modules) >= {"self_attn.q_proj", "lm_head", "embed_tokens"}
    assert result.alternative is not None
    assert result.alternative.rounding == "stochastic"
    assert result.alternative.effective_alpha == pytest.approx(1.3, abs=0.05)


def test_small_deltas_lose_alpha_to_nearest_and_keep_it_with_stochastic(tmp_path: Path) -> None:
    # FIELD's synthetic test: the delta is below bfloat16's spacing, and does not grow with it.
    sft = {"w": (torch.randn(400, 1000, dtype=torch.float64) * 0.003).float()}
    aligned = {"w": (sft["w"].double() + torch.randn(400, 1000).double() * 6.35e-6).float()}
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", aligned)
    measured = {}
    for rounding in ("nearest", "stochastic"):
        result = extrapolate(
            tmp_path / "sft", tmp_path / "aligned", tmp_path / rounding, alpha=1.3,
            dtype="bfloat16", rounding=rounding,
        )  # fmt: skip
        measured[rounding] = result
    assert measured["stochastic"].statistics.effective_alpha == pytest.approx(1.3, abs=0.05)
    other = measured["nearest"].alternative
    assert other is not None
    assert other.effective_alpha == pytest.approx(1.3, abs=0.15)  # estimated from one block


def test_manifest_and_card_tell_how_it_was_made(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extrapolate(pair.sft, pair.aligned, out, alpha=1.5)
    content = json.loads((out / "expo.json").read_text())
    assert content["schema"] == "expo.manifest/1"
    assert (content["alpha"], content["paper_alpha"]) == (1.5, 0.5)
    hashes = {name: h for name, h in digest(out).items() if name != "expo.json"}
    assert content["files"] | content["beside"] == hashes
    assert content["beside"].keys() == {"README.md"}  # may change
    text = (out / "expo.json").read_text() + (out / "README.md").read_text()
    assert str(tmp_path) not in text  # no absolute path
    assert "alpha 1.5 (paper alpha 0.5)" in (out / "README.md").read_text()


def test_the_index_names_every_tensor(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extrapolate(pair.sft, pair.aligned, out, alpha=1.5)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 - not a dict
            assert shard.metadata() == {"format": "pt"}
    total = sum(t.numel() * t.element_size() for t in pair.aligned_tensors.values())
    assert index["metadata"]["total_size"] == total
    assert {p.name for p in out.glob("*.safetensors")} == {
        p.name for p in pair.aligned.glob("*.safetensors")
    }


def test_max_shard_size_re_shards(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    ran = expo(
        "extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5, "--max-shard-size", "0.8KB"
    )
    assert ran.code == 0, ran.err
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert_same(load(out), naive(pair.sft_tensors, pair.aligned_tensors, 1.5))


def test_file_modes_follow_the_umask(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extrapolate(pair.sft, pair.aligned, out, alpha=1.5)
    probe = tmp_path / "probe"
    probe.touch()
    probe_dir = tmp_path / "probe-dir"
    probe_dir.mkdir()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(probe_dir.stat().st_mode)
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(probe.stat().st_mode), path


def test_mixed_dtypes_stay_as_the_aligned_model_has_them(tmp_path: Path) -> None:
    sft = weights()
    sft["router.bias"] = torch.randn(4)
    aligned = nudged(sft)
    aligned["model.norm.weight"] = aligned["model.norm.weight"].float()
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", aligned)
    extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", alpha=1.5)
    assert_same(load(tmp_path / "out"), naive(sft, aligned, 1.5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.int32])
def test_integers_are_copied_when_equal_and_refused_when_not(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    sft = weights()
    sft["position_ids"] = torch.tensor([1, 0, 1, 1]).to(dtype)
    aligned = nudged({n: t for n, t in sft.items() if t.is_floating_point()})
    aligned["position_ids"] = sft["position_ids"].clone()
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", aligned)
    extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", alpha=1.5)
    assert torch.equal(load(tmp_path / "out")["position_ids"], sft["position_ids"])
    aligned["position_ids"] = torch.tensor([1, 1, 1, 1]).to(dtype)
    write_checkpoint(tmp_path / "aligned", aligned)
    with pytest.raises(door.CheckpointError, match=r"position_ids holds .* differ between SFT"):
        extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out2", alpha=1.5)
    assert not (tmp_path / "out2").exists()


def test_dtype_change_is_written_into_the_configuration(pair: Pair, tmp_path: Path) -> None:
    config = CONFIG | {"torch_dtype": "bfloat16"}
    (pair.aligned / "config.json").write_text(json.dumps(config))
    extrapolate(pair.sft, pair.aligned, tmp_path / "same", alpha=1.5, dtype="bfloat16")
    assert (tmp_path / "same" / "config.json").read_bytes() == (
        pair.aligned / "config.json"
    ).read_bytes()
    extrapolate(pair.sft, pair.aligned, tmp_path / "wide", alpha=1.5, dtype="float32")
    assert json.loads((tmp_path / "wide" / "config.json").read_text()) == config | {
        "torch_dtype": "float32"
    }


def test_apply_in_memory_gives_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.3)
    applied = dict(door.apply(pair.sft_tensors, pair.aligned_tensors, alpha=1.3))
    assert_same(applied, load(tmp_path / "out"))
    with pytest.raises(door.CheckpointError, match="do not hold the same tensors"):
        next(iter(door.apply({}, pair.aligned_tensors, alpha=1.3)))


def test_a_spec_gives_the_bytes_of_the_flags(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    spec = tmp_path / "spec.yml"
    spec.write_text(
        f"merge_method: expo\nbase_model: {pair.sft}\nmodels:\n  - model: {pair.aligned}\n"
        "    parameters: {paper_alpha: 0.3}\nrounding: stochastic\nseed: 5\n"
    )
    flags = ("--alpha", 1.3, "--rounding", "stochastic", "--seed", 5, "-q")
    assert expo("merge", spec, tmp_path / "a", "-q").code == 0
    assert expo("extrapolate", pair.sft, pair.aligned, tmp_path / "b", *flags).code == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert expo("merge", spec, tmp_path / "c", "--seed", 6, "-q").code == 0
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_hash_inputs_names_every_input_by_content(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    ran = expo(
        "extrapolate", pair.sft, pair.aligned, tmp_path / "out", "--alpha", 1.5, "--hash-inputs"
    )
    assert ran.code == 0, ran.err
    inputs = json.loads((tmp_path / "out" / "expo.json").read_text())["inputs"]
    expected = hashlib.sha256((pair.sft / "model.safetensors").read_bytes()).hexdigest()
    assert inputs["sft sft/model.safetensors"]["sha256"] == expected


def test_an_input_that_changes_under_way_is_noticed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5))
    calls = []

    def progress(_done: int, _total: int) -> None:
        if not calls:
            calls.append(1)
            (pair.sft / "model.safetensors").touch()

    with pytest.raises(
        door.CheckpointError, match=r"sft/model.safetensors changed while it was read"
    ):
        run_plan(plan, tmp_path / "out", progress=progress)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "sft"]


def test_a_misaligned_input_is_read_right(tmp_path: Path) -> None:
    # Nothing aligns tensors inside a file: a header of odd length shifts all of them.
    sft = {"flag": torch.tensor([True]), **weights(dtype=torch.float32)}
    aligned = {n: (t if t.dtype == torch.bool else nudged({n: t})[n]) for n, t in sft.items()}
    for side, tensors in (("sft", sft), ("aligned", aligned)):
        write_checkpoint(tmp_path / side, {})
        _write_packed(tmp_path / side / "model.safetensors", tensors)
    extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", alpha=1.5)
    expected = naive(
        {n: t for n, t in sft.items() if n != "flag"},
        {n: t for n, t in aligned.items() if n != "flag"},
        1.5,
    )
    result = load(tmp_path / "out")
    assert torch.equal(result.pop("flag"), sft["flag"])
    assert_same(result, expected)


def _write_packed(path: Path, tensors: Tensors) -> None:
    header, data = {}, b""
    names = {torch.bool: "BOOL", torch.float32: "F32"}
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_overwrite_keeps_the_old_model_until_the_new_one_is_whole(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    out = write_checkpoint(tmp_path / "out", pair.sft_tensors)
    (out / "vocab.json").write_text("old")
    refused = expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5)
    assert refused.code == 1
    assert "exists and is not empty: choose another, or add --overwrite" in refused.err
    bad = nudged(pair.sft_tensors)
    bad["lm_head.weight"][0, 0] = torch.nan
    write_checkpoint(tmp_path / "bad", bad)
    assert (
        expo("extrapolate", pair.sft, tmp_path / "bad", out, "--alpha", 1.5, "--overwrite").code
        == 1
    )
    assert (out / "vocab.json").read_text() == "old"
    assert expo("extrapolate", pair.sft, pair.aligned, out, "--alpha", 1.5, "--overwrite").code == 0
    assert not (out / "vocab.json").exists()
    assert (out / "expo.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "bad", "out", "sft"]


def test_an_empty_out_is_filled_from_inside(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    identity = out.stat().st_ino
    extrapolate(pair.sft, pair.aligned, out, alpha=1.5)
    assert out.stat().st_ino == identity
    assert_same(load(out), naive(pair.sft_tensors, pair.aligned_tensors, 1.5))
    assert not list(out.glob(".expo*"))


def test_out_may_not_overlap_an_input(pair: Pair, tmp_path: Path) -> None:
    for out in (pair.sft, pair.sft / "out", tmp_path):
        with pytest.raises(door.OutputError):
            door.merge(
                make_request(str(pair.sft), str(pair.aligned), alpha=1.5), out, overwrite=True
            )
    assert sorted(p.name for p in pair.sft.iterdir()) == ["config.json", "model.safetensors"]


def test_save_file_is_not_needed_to_be_lucky(tmp_path: Path) -> None:
    """One tensor of 70 MB is split into chunks and comes out whole."""
    generator = torch.Generator().manual_seed(0)
    big = (torch.randn(35_000, 1000, generator=generator) * 0.02).bfloat16()
    for side, tensor in (("sft", big), ("aligned", (big.float() * 1.01).bfloat16())):
        (tmp_path / side).mkdir()
        save_file({"w": tensor}, tmp_path / side / "model.safetensors")
    extrapolate(tmp_path / "sft", tmp_path / "aligned", tmp_path / "out", alpha=1.5)
    aligned = load(tmp_path / "aligned")
    assert_same(load(tmp_path / "out"), naive({"w": big}, aligned, 1.5))
