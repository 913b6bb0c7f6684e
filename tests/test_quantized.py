"""Quantized models as inputs: whatever reads a model reads what its codes stand for."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expo as door
from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.memory import Memory
from expo.checkpoint.reader import Bytes
from expo.checkpoint.reference import parse_reference
from expo.checkpoint.weight import Weight
from expo.compute.inputs import Readers
from expo.compute.stream import Tuning, tensors
from expo.demo.toy import MODELS
from expo.operators.rounding import round_nearest
from expo.planning.build import build_plan, plan_of
from expo.planning.plan import Plan
from expo.spec.request import laser_request, make_request, matrix_edit
from expo.verbs.laser import accept

from .conftest import CONFIG, Ran, Tensors, nudged, weights, write_checkpoint
from .quantized import FP8, fp8, mxfp4, plain, quantized, unpacked, write_quantized
from .range_server import RangeServer

Expo = Callable[..., Ran]

BLOCK = (16, 8)  # of [10, 10] and [33, 10]: ragged in both directions
SECTION = FP8 | {"weight_block_size": [*BLOCK]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
CHANGE = 2e-3


@dataclass(frozen=True)
class Twins:
    """A pair in codes, and the same numbers in float32 that say nothing of codes."""

    sft: Path
    aligned: Path
    plain_sft: Path
    plain_aligned: Path


@pytest.fixture
def twins(tmp_path: Path) -> Twins:
    """SFT in one file, the aligned model in three, of which the last holds its scales."""
    sft, aligned = quantized(weights(), BLOCK), quantized(nudged(weights(), scale=CHANGE), BLOCK)
    return Twins(
        write_quantized(tmp_path / "sft", sft, SECTION),
        write_quantized(tmp_path / "aligned", aligned, SECTION, shards=3),
        write_checkpoint(tmp_path / "plain-sft", plain(sft, BLOCK)),
        write_checkpoint(tmp_path / "plain-aligned", plain(aligned, BLOCK)),
    )


def held(folder: Path) -> Tensors:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}  # fmt: skip


def same(got: Tensors, want: Tensors) -> bool:
    """The same names, dtypes and bits."""
    return got.keys() == want.keys() and all(
        t.dtype == want[n].dtype and torch.equal(t, want[n]) for n, t in got.items()
    )


def merged(sft: Path, aligned: Path, out: Path, **how: object) -> Tensors:
    door.extrapolate(sft, aligned, out, alpha=1.5, verify=False, **how)  # type: ignore[arg-type]
    return held(out)


def test_a_merge_is_that_of_the_numbers(twins: Twins, tmp_path: Path) -> None:
    want = merged(twins.plain_sft, twins.plain_aligned, tmp_path / "want", dtype="bfloat16")
    assert same(merged(twins.sft, twins.aligned, tmp_path / "out"), want)
    assert same(merged(twins.sft, twins.plain_aligned, tmp_path / "a", dtype="bfloat16"), want)
    assert same(merged(twins.plain_sft, twins.aligned, tmp_path / "b"), want)
    b, a = (held(folder)["model.layers.1.mlp.up_proj.weight"].double() for folder in (twins.plain_sft, twins.plain_aligned))  # fmt: skip
    exact = a + 0.5 * (a - b)
    error = (want["model.layers.1.mlp.up_proj.weight"].double() - exact).abs() / exact.abs()
    assert float(error.max()) < 2**-8


def test_float64_beside_codes(twins: Twins) -> None:
    """Computed in float64, from the numbers that float32 has of the codes."""
    name = "model.layers.0.mlp.up_proj.weight"
    sft = {n: t.double() for n, t in weights(dtype=torch.float64).items()}
    aligned = held(twins.aligned)
    b, a = sft[name], held(twins.plain_aligned)[name].double()
    got = dict(door.apply(sft, aligned, alpha=1.5))[name]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, round_nearest(a + 0.5 * (a - b), torch.bfloat16))


def test_the_output_is_a_plain_model(twins: Twins, tmp_path: Path, expo: Expo) -> None:
    (twins.aligned / "config.json").write_text(json.dumps(
        CONFIG | {"dtype": "float16", "quantization_config": SECTION,
                  "text_config": {"x": 1, "quantization_config": SECTION}}))  # fmt: skip
    ran = expo("extrapolate", twins.sft, twins.aligned, tmp_path / "out", "--alpha", 1.5)
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config == CONFIG | {"dtype": "bfloat16", "text_config": {"x": 1}}
    files = {path.name for path in out.glob("*.safetensors")}
    assert files == {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == files
    assert index["weight_map"].keys() == held(out).keys() == weights().keys()
    manifest = json.loads((out / "expo.json").read_text())
    assert "aligned is dequantized as it is read: 4 tensors in FP8 (E4M3, a scale for 16 × 8)" in manifest["notes"]  # fmt: skip
    assert 0 < manifest["noise"]["ratio"] < 1
    assert manifest["noise"]["tensors"] == 4
    assert "| noise of quantized inputs | about 0.37 times the change, estimated from 4 tensors |" in (out / "README.md").read_text()  # fmt: skip
    assert "note: aligned is dequantized as it is read" in ran.err
    assert len(manifest["inputs"]) == 5  # the file that holds nothing but scales is one of them


def test_a_donor_without_codes_keeps_its_configuration(twins: Twins, tmp_path: Path) -> None:
    path = twins.plain_aligned / "config.json"
    path.write_text(json.dumps(CONFIG, indent=1))
    merged(twins.sft, twins.plain_aligned, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == path.read_bytes()


def forms() -> dict[str, tuple[Tensors, Tensors, dict | None]]:
    """Ways of coding one matrix: (what is stored, the number of every element, config's section)."""
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(3)) * 0.02
    name, found = "model.layers.0.mlp.up_proj.weight", {}

    def form(label: str, block: tuple[int, int], section: dict | None, *, dtype: torch.dtype = torch.float32,
             shape: tuple[int, ...] | None = None, suffix: str = "_scale") -> None:  # fmt: skip
        codes, scales = fp8(weight, block, dtype)
        stored = scales if shape is None else scales.reshape(shape)
        number = plain({"w": codes, "w_scale_inv": scales.float()}, block)["w"]
        found[label] = ({name: codes, name + suffix: stored}, {name: number}, section)

    def groups(**of_weights: object) -> dict:
        return COMPRESSED | {"config_groups": {"g": {"targets": ["Linear"], "weights": of_weights}}}

    form("a tensor, []", (20, 12), None, shape=())
    form("a tensor, [1]", (20, 12), groups(strategy="tensor"), dtype=torch.bfloat16, shape=(1,))
    form(
        "a tensor, fp8", (20, 12), FP8 | {"weight_block_size": None}, shape=(), suffix="_scale_inv"
    )
    form("a row", (1, 12), groups(strategy="channel"), dtype=torch.float16)
    form("a row, fbgemm", (1, 12), {"quant_method": "fbgemm_fp8"})
    form("blocks", (8, 5), groups(strategy="block", block_structure=[8, 5]))
    form("groups", (1, 4), groups(strategy="group", group_size=4))
    form(
        "blocks, powers",
        (8, 5),
        FP8 | {"weight_block_size": [8, 5]},
        dtype=torch.float8_e8m0fnu,
        suffix="_scale_inv",
    )
    form("blocks that nobody states", (8, 4), None)
    form("one block of 128", (128, 128), None)
    codes, scales = fp8(weight, (8, 5), torch.float8_e8m0fnu)
    number = plain({"w": codes, "w_scale_inv": scales.float()}, (8, 5))["w"]
    bytes_ = {name: codes, name + "_scale_inv": scales.view(torch.uint8)}
    found["powers as bytes"] = bytes_, {name: number}, FP8 | {"weight_block_size": [8, 5]}
    return found  # fmt: skip


FORMS = forms()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_scales(form: str, tmp_path: Path) -> None:
    stored, want, section = FORMS[form]
    activation = {"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}
    write_quantized(tmp_path / "model", stored | activation, section)
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "model")}]}
    result = door.merge(spec | {"dtype": "float32"}, tmp_path / "out", verify=False)
    assert same(held(tmp_path / "out"), want)
    assert "1 tensor with scales of activations left out" in result.notes[0]
    if section is None:
        return
    door.merge(spec, tmp_path / "half", verify=False)
    assert same(held(tmp_path / "half"), {n: t.bfloat16() for n, t in want.items()})


def test_parameters_that_are_called_as_scales_are(tmp_path: Path) -> None:
    """Gemma 3n has one that is learned; whose name is that of a scale decides nothing alone."""
    names = ("model.layers.0.altup.correct_output_scale", "head.k_scale", "other.input_scale")
    learned = {name: torch.randn(4, generator=torch.Generator().manual_seed(3)) for name in names}
    left = {"model.layers.0.mlp.up_proj.output_scale": torch.ones(1), "model.layers.0.mlp.k_scale": torch.ones(1)}  # fmt: skip
    stored, want, section = FORMS["a row"]
    write_quantized(tmp_path / "model", stored | learned | left, section)
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "model")}]}
    door.merge(spec | {"dtype": "float32"}, tmp_path / "out", verify=False)
    assert same(held(tmp_path / "out"), want | learned)


def test_a_plain_model_may_call_its_parameters_scales(tmp_path: Path) -> None:
    names = ("layers.0.residual_scales", "layers.0.scales", "layers.0.logit_blocks")
    plain = weights() | {name: torch.ones(4).bfloat16() for name in names}
    write_checkpoint(tmp_path / "model", plain)
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "model")}]}
    door.merge(spec, tmp_path / "out", verify=False)
    assert same(held(tmp_path / "out"), plain)
    checks = {check.name: check for check in door.verify(tmp_path / "out").checks}
    assert checks["codes"].status == "pass"


def test_edits_are_tried_on_numbers(tmp_path: Path) -> None:
    """With the model that is written, not with codes, nor as a library dequantizes them."""
    tensors_ = load_file(MODELS / "aligned" / "model.safetensors")
    config = json.loads((MODELS / "aligned" / "config.json").read_text())
    coded = quantized(tensors_, (48, 48))
    write_quantized(tmp_path / "coded", coded, FP8 | {"weight_block_size": [48, 48]}, config=config)
    for file in MODELS.glob("aligned/*token*"):
        shutil.copy(file, tmp_path / "coded")
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "coded")}]}
    door.merge(spec, tmp_path / "plain", verify=False)
    (tmp_path / "texts").write_text("yes\nno\nmaybe\nsure\n")
    said = []
    for name in ("coded", "plain"):
        edit = matrix_edit("rank=12", target="mlp")
        request = laser_request(str(tmp_path / name), edit)
        said.append(accept(request, tmp_path / "texts", device="cpu").summary())
    assert said[0] == said[1]


def experts(seed: int, change: float = 0.0) -> Tensors:
    """[2, 6, 96] and [3, 5, 64] experts, one of them in FP8 with a scale a row of every expert."""
    generator = torch.Generator().manual_seed(9)
    noise = torch.Generator().manual_seed(seed)
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": (2, 6, 96), "model.layers.0.mlp.experts.down_proj": (3, 5, 64)}  # fmt: skip
    return {
        name: torch.randn(shape, generator=generator) * 0.02
        + torch.randn(shape, generator=noise) * change
        for name, shape in shapes.items()
    }


def coded_experts(tensors_: Tensors) -> tuple[Tensors, Tensors]:
    """(stored, numbers): MXFP4 and a stack in FP8."""
    up, down = tensors_.keys()
    blocks, scales = mxfp4(tensors_[up])
    coded = [fp8(one, (2, 64)) for one in tensors_[down]]
    stored = {f"{up}_blocks": blocks, f"{up}_scales": scales, down: torch.stack([c for c, _ in coded]),
              f"{down}_scale": torch.stack([s for _, s in coded])}  # fmt: skip
    each = [plain({"w": c, "w_scale_inv": s}, (2, 64))["w"] for c, s in coded]
    return stored, {up: unpacked(blocks, scales), down: torch.stack(each)}


@pytest.fixture
def stacks(tmp_path: Path) -> Twins:
    (sft, plain_sft), (aligned, plain_aligned) = (coded_experts(experts(1)), coded_experts(experts(2, 0.01)))  # fmt: skip
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Twins(
        write_quantized(tmp_path / "sft", sft, section),
        write_quantized(tmp_path / "aligned", aligned, None),
        write_checkpoint(tmp_path / "plain-sft", plain_sft),
        write_checkpoint(tmp_path / "plain-aligned", plain_aligned),
    )


def test_experts_come_transposed(stacks: Twins, tmp_path: Path) -> None:
    want = merged(stacks.plain_sft, stacks.plain_aligned, tmp_path / "want", dtype="bfloat16")
    assert want["model.layers.0.mlp.experts.gate_up_proj"].shape == (2, 96, 6)
    assert same(merged(stacks.sft, stacks.aligned, tmp_path / "out"), want)
    assert same(merged(stacks.plain_sft, stacks.aligned, tmp_path / "half"), want)


def planned(pair: Twins, dtype: str | None = None) -> Plan:
    return build_plan(make_request(str(pair.sft), str(pair.aligned), alpha=1.5, dtype=dtype))


@pytest.mark.parametrize("which", ["twins", "stacks"])
def test_bytes_depend_on_nothing_but_the_numbers(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, chunks, threads, and which of the two arithmetics computes."""
    pair: Twins = request.getfixturevalue(which)
    plan = planned(pair)
    whole = dict(tensors(plan))
    for block, chunk, threads in ((7, 64, 3), (32, 100, 1), (64, 1 << 20, 2)):
        tuning = Tuning(threads=threads, chunk_bytes=chunk, block_elements=block)
        assert same(dict(tensors(plan, tuning=tuning)), whole)
    monkeypatch.setattr("expo.compute.choice._compiled", lambda: None)
    assert same(dict(tensors(plan)), whole)
    double = dict(tensors(planned(pair, "float64")))
    assert all(torch.equal(whole[name], t.bfloat16()) for name, t in double.items())


@dataclass(frozen=True)
class Elsewhere(Memory):
    """Weights in memory that count as far away, and are read by range."""

    streams: bool = True

    def is_local(self, name: str) -> bool:
        return not name.endswith(".safetensors")


def test_matrices_of_codes_are_read_once(stacks: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though pieces are cut anywhere in them, and given to any worker."""
    read = Counter[tuple[str, int]]()
    whole = Readers._whole_matrix

    def counted(readers: Readers, weight: Weight, begin: int) -> Bytes:
        read[weight.files.label, begin] += 1
        return whole(readers, weight, begin)

    monkeypatch.setattr(Readers, "_whole_matrix", counted)
    got = dict(
        tensors(planned(stacks), tuning=Tuning(threads=3, chunk_bytes=128, block_elements=16))
    )
    assert same(got, dict(tensors(planned(stacks))))
    assert set(read.values()) == {2}  # by either run once
    assert len(read) == 4


@pytest.mark.parametrize("which", ["twins", "stacks"])
def test_what_is_fetched_ahead_is_what_is_needed(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Codes and scales, wherever they lie; nothing is asked for that no piece has announced."""
    pair: Twins = request.getfixturevalue(which)
    want = dict(tensors(planned(pair)))
    request_ = make_request(str(pair.sft), str(pair.aligned), alpha=1.5)
    opened = {}
    for reference in request_.references():
        here = open_checkpoint(reference)
        contents = {n: np.frombuffer(bytearray(here.files.read(n)), np.uint8) for n in here.files.sizes}  # fmt: skip
        opened[reference] = replace(here, files=Elsewhere(here.label, contents))
    plan = plan_of(request_, opened)
    stored = sum(t.nbytes for c in opened.values() for s in c.shards for t in s.tensors)
    assert plan.stream_bytes == plan.read_bytes == stored
    tuning = Tuning(threads=2, chunk_bytes=128, block_elements=16)
    assert same(dict(tensors(plan, tuning=tuning)), want)


def test_models_in_a_store(twins: Twins, tmp_path: Path) -> None:
    """By range, the sample of the noise included."""
    state = RangeServer({"sft": twins.sft, "aligned": twins.aligned})
    running = state.start()
    got = merged(f"{state.url}/sft", f"{state.url}/aligned", tmp_path / "out")  # type: ignore[arg-type]
    running.shutdown()
    running.server_close()
    assert same(got, merged(twins.sft, twins.aligned, tmp_path / "want"))
    manifests = [json.loads((tmp_path / name / "expo.json").read_text()) for name in ("out", "want")]  # fmt: skip
    assert manifests[0]["noise"] == manifests[1]["noise"]


def adapter(folder: Path) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    generator = torch.Generator().manual_seed(5)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{prefix}.lora_A.weight": torch.randn(2, 10, generator=generator) * 0.1,
               f"{prefix}.lora_B.weight": torch.randn(33, 2, generator=generator) * 0.1}  # fmt: skip
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_on_a_quantized_base(twins: Twins, tmp_path: Path, expo: Expo) -> None:
    """Its change is exact: nothing of it was rounded to codes."""
    lora = adapter(tmp_path / "lora")
    want = merged(twins.plain_sft, f"{twins.plain_sft}+{lora}", tmp_path / "want", dtype="bfloat16")  # type: ignore[arg-type]
    got = merged(twins.sft, f"{twins.sft}+{lora}", tmp_path / "out")  # type: ignore[arg-type]
    assert same(got, want)
    ran = expo("plan", twins.sft, f"{twins.sft}+{lora}", "--alpha", 1.5, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["noise"] is None
    ran = expo("extrapolate", twins.sft, f"{twins.sft}+{lora}", tmp_path / "scaled", "--alpha", 1.5, "--as-adapter")  # fmt: skip
    assert ran.code == 0, ran.err


def test_the_other_verbs_see_numbers(twins: Twins, tmp_path: Path) -> None:
    coded, numbers = (twins.sft, twins.aligned), (twins.plain_sft, twins.plain_aligned)
    assert door.diff(*coded).tensors == door.diff(*numbers).tensors
    spectra = [door.spectrum(aligned, minus=sft, target="up_proj") for sft, aligned in (coded, numbers)]  # fmt: skip
    assert [s.noise_sigma for s in spectra[0]] == [s.noise_sigma for s in spectra[1]]
    assert all(s.ulp_ratio is None for s in spectra[0])  # type: ignore[attr-defined]
    for name, (sft, aligned) in {"coded": coded, "plain": numbers}.items():
        door.extract_lora(aligned, tmp_path / f"lora-{name}", minus=sft, rank=2)
    assert same(held(tmp_path / "lora-coded"), held(tmp_path / "lora-plain"))
    for method in ("ties", "task_arithmetic"):
        for name, (sft, aligned) in {"coded": coded, "plain": numbers}.items():
            models = [{"model": str(aligned), "parameters": {"weight": 0.7, "density": 0.5} if method == "ties" else {"weight": 0.7}}]  # fmt: skip
            spec = {"merge_method": method, "base_model": str(sft), "models": models, "dtype": "bfloat16"}  # fmt: skip
            door.merge(spec, tmp_path / f"{method}-{name}", verify=False)
        assert same(held(tmp_path / f"{method}-coded"), held(tmp_path / f"{method}-plain"))


def test_several_alphas_and_cuts(twins: Twins, tmp_path: Path, expo: Expo) -> None:
    for sft, aligned, name in ((twins.sft, twins.aligned, "coded"), (twins.plain_sft, twins.plain_aligned, "plain")):  # fmt: skip
        ran = expo("extrapolate", sft, aligned, tmp_path / name, "--alphas", "1.2,1.5", "--dtype", "bfloat16")  # fmt: skip
        assert ran.code == 0, ran.err
        ran = expo("laser", aligned, tmp_path / f"laser-{name}", "--keep", "rank=3", "--dtype", "bfloat16")  # fmt: skip
        assert ran.code == 0, ran.err
    for one in ("{}-alpha-1.2", "{}-alpha-1.5", "laser-{}"):
        assert same(held(tmp_path / one.format("coded")), held(tmp_path / one.format("plain")))


def test_a_cut_at_the_noise_of_codes_is_refused(twins: Twins, tmp_path: Path, expo: Expo) -> None:
    spec = tmp_path / "spec.yml"
    spec.write_text(
        f"merge_method: expo\nbase_model: {twins.sft}\n"
        f"models: [{{model: {twins.aligned}, parameters: {{alpha: 1.5}}}}]\n"
        "transforms: [{low_rank: {keep: gd}}]\n"
    )
    ran = expo("merge", spec, tmp_path / "out", "-q")
    assert ran.code == 1
    assert "keep gd would cut the change of model.layers.0.mlp.up_proj.weight and 3 more at its noise level, which is that of quantized inputs" in ran.err  # fmt: skip
    assert expo("merge", spec, tmp_path / "out", "-q", "--force").code == 0


def test_state_dicts_in_memory(twins: Twins) -> None:
    sft, aligned = held(twins.sft), held(twins.aligned)
    want = dict(tensors(planned(twins)))
    assert same(dict(door.apply(sft, aligned, alpha=1.5)), want)
    del sft["model.layers.0.mlp.up_proj.weight_scale_inv"]
    with pytest.raises(door.CheckpointError, match=r"^SFT is quantized \(model.layers.0.mlp.up_proj.weight is F8_E4M3\), and there is no"):  # fmt: skip
        dict(door.apply(sft, aligned, alpha=1.5))


def test_a_document_may_name_what_an_earlier_one_made_of_codes(twins: Twins, tmp_path: Path) -> None:  # fmt: skip
    spec = tmp_path / "spec.yml"
    spec.write_text(
        f"name: whole\nmerge_method: passthrough\nmodels: [{{model: {twins.aligned}}}]\n---\n"
        f"merge_method: expo\nbase_model: {twins.sft}\n"
        "models: [{model: whole, parameters: {alpha: 1.5}}]\n"
    )
    door.merge(spec, tmp_path / "out", verify=False)
    assert not any("scale" in name for name in held(tmp_path / "out"))


def test_mergekits_engine_reads_no_codes(twins: Twins, tmp_path: Path, expo: Expo) -> None:
    spec = tmp_path / "spec.yml"
    spec.write_text(f"merge_method: nearswap\nbase_model: {twins.plain_sft}\nmodels: [{{model: {twins.aligned}}}]\nparameters: {{t: 0.1}}\n")  # fmt: skip
    ran = expo("plan", spec)
    assert ran.code == 1
    assert "aligned is quantized, which mergekit's engine does not read" in ran.out


def test_a_scale_may_lie_in_any_file(twins: Twins, tmp_path: Path) -> None:
    """As with `twins`, but the first file holds scales of the second, and nothing else is told apart."""
    with safe_open(twins.sft / "model.safetensors", "pt") as file:
        names = [*file.keys()]
    tensors_ = held(twins.sft)
    odd = tmp_path / "odd"
    write_checkpoint(odd, {name: tensors_[name] for name in sorted(names, reverse=True)}, shards=4)
    (odd / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": SECTION}))
    want = merged(twins.sft, twins.aligned, tmp_path / "want")
    assert same(merged(odd, twins.aligned, tmp_path / "out"), want)


def test_weights_by_name_are_the_model(twins: Twins) -> None:
    checkpoint = open_checkpoint(parse_reference(str(twins.aligned), role="ALIGNED"))
    assert checkpoint.weights.keys() == weights().keys()
    assert {w.dtype for w in checkpoint.weights.values()} == {"BF16"}
    coded = {name for name, weight in checkpoint.weights.items() if weight.codes}
    assert coded == {name for name in weights() if "proj" in name}
