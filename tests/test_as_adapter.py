"""ExPO of base+adapter as an adapter: what peft makes of it, against float64; what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import expo as door
from expo.errors import CheckpointError, SpecError
from expo.output.manifest import AdapterManifest, read_manifest

from .conftest import Ran, extrapolate
from .test_formats import ADAPTERS, tiny_model, trained_adapter
from .test_merge import load

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {**ADAPTERS, "rslora patterns": {"use_rslora": True, **ADAPTERS["patterns"]}}
del KINDS["modules to save"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What peft makes of it, all in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    peft = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    return dict(peft.double().merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.5, 0.0])
def test_peft_adds_alpha_times_the_change(
    base: Path, tmp_path: Path, kind: str, alpha: float
) -> None:
    trained_adapter(base, tmp_path / "lora", 1, **KINDS[kind])
    adapted = f"{base}+{tmp_path / 'lora'}"
    result = door.extrapolate_adapter(base, adapted, tmp_path / "scaled", alpha=alpha)
    assert (result.verified, result.scale, result.energy) == (True, alpha, 1.0)
    start, aligned = load(base), merged(base, tmp_path / "lora")
    extrapolate(base, adapted, tmp_path / "whole", alpha=alpha)
    whole = load(tmp_path / "whole")
    for name, tensor in merged(base, tmp_path / "scaled").items():
        if name not in start:
            continue  # the tied head
        reference = start[name].double() + alpha * (aligned[name] - start[name].double())
        assert float((tensor - reference).abs().max()) < 1e-14, name
        assert float((tensor - whole[name].double()).abs().max()) < 1e-6, name


def test_the_matrices_are_copied_and_the_rest_is_told(
    base: Path, tmp_path: Path, expo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained_adapter(base, tmp_path / "lora", 1)
    (tmp_path / "lora" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "lora" / "NOTICE").write_text("mine")
    ran = expo("extrapolate", "base", "base+lora", "out", "--as-adapter", "--alpha", 1.5)
    assert ran.code == 0, ran.err
    assert ran.out == "the adapter of base+lora, its scale times 1.5: exact\n"
    assert "verified" in ran.err
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "lora" / weights).read_bytes()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["base_model_name_or_path"]) == (9, "base")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\n# lora-ExPO\n" in text
    assert "its scale times 1.5" in text.replace("with ", "")
    assert "expo extrapolate base base+lora out --as-adapter --alpha 1.5" in text
    assert (
        str(tmp_path)
        not in text + json.dumps(config) + (tmp_path / "out" / "expo.json").read_text()
    )
    assert (tmp_path / "out" / "NOTICE").read_text() == "mine"
    assert expo("card", "out").out == text
    shown = expo("info", "out").out
    assert "the matrices of lora, for SFT, times 1.5" in shown
    ran = expo(
        "extrapolate", "base", "base+lora", "half", "--as-adapter", "--alpha", 0.5, "--interpolate"
    )
    assert ran.code == 0, ran.err
    assert "--alpha 0.5 --interpolate" in (tmp_path / "half" / "README.md").read_text()
    flags = ("--as-adapter", "--alpha", 1.5, "--no-verify")
    assert (
        "--no-verify: not with --as-adapter"
        in expo("extrapolate", "base", "base+lora", "no", *flags).err
    )
    ran = expo("card", "out", "--license", "mit")
    assert ModelCard(ran.out).data.to_dict()["license"] == "mit"
    again = expo("extrapolate", "base", "base+lora", "out", "--as-adapter", "--alpha", 1.5)
    assert (again.code, "exists and is not empty" in again.err) == (1, True)


def test_it_verifies_like_a_model(base: Path, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    trained_adapter(base, tmp_path / "lora", 1)
    out = tmp_path / "out"
    door.extrapolate_adapter(base, f"{base}+{tmp_path / 'lora'}", out, alpha=1.5)
    assert expo("verify", out, "-q").code == 0
    assert expo("verify", out, "--against", base, "-q").code == 0
    assert isinstance(read_manifest(out), AdapterManifest)
    stored = load_file(out / "adapter_model.safetensors")
    name = next(name for name in stored if "lora_A" in name)
    broken = tmp_path / "broken"
    for change, words in (
        (lambda: save_file(stored | {name: stored[name] + 1}, broken / "adapter_model.safetensors"), "adapter_model.safetensors was changed"),
        (lambda: save_file(stored | {name: stored[name] * float("nan")}, broken / "adapter_model.safetensors"), "NaN or infinite"),
        (lambda: save_file({name: stored[name]}, broken / "adapter_model.safetensors"), "has no B matrix"),
        (lambda: (broken / "adapter_model.safetensors").unlink(), "there is no adapter_model.safetensors"),
        (lambda: (broken / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "is a IA3 adapter"),
    ):  # fmt: skip
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(out, broken)
        change()
        ran = expo("verify", broken, "-q")
        assert ran.code == 3, words
        assert words in " ".join(ran.out.split()), words
    other = tmp_path / "other"
    save_file({"w": torch.zeros(2)}, (other.mkdir() or other) / "model.safetensors")
    ran = expo("verify", out, "--against", other, "-q")
    assert "which the base lacks: is it the right base?" in " ".join(ran.out.split())


def test_what_no_factor_extrapolates(base: Path, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    lora, out = tmp_path / "lora", tmp_path / "out"

    def refused(sft: Path, aligned: object, **options: object) -> str:
        shutil.rmtree(lora, ignore_errors=True)
        trained_adapter(base, lora, 1, **options)
        with pytest.raises((CheckpointError, SpecError)) as error:
            door.extrapolate_adapter(sft, str(aligned), out, alpha=1.5)
        assert not out.exists()
        return str(error.value)

    adapted = f"{base}+{lora}"
    assert "uses DoRA magnitudes (use_dora)" in refused(base, adapted, use_dora=True)
    saved = refused(base, adapted, modules_to_save=["lm_head"])
    assert (
        "saves lm_head.weight whole (modules_to_save, or a bias), which no factor extrapolates"
        in saved
    )
    assert "is a whole model, write BASE+ADAPTER" in refused(base, base)
    tiny_model(seed=5).save_pretrained(tmp_path / "another")
    another = refused(tmp_path / "another", adapted)
    assert "the adapter is added to base, SFT is another: name the same model twice" in another
    ran = expo(
        "extrapolate", base, adapted, out, "--as-adapter", "--alpha", 1.5, "--dtype", "float32"
    )
    assert (
        ran.err == "expo: --dtype: not with --as-adapter, which copies the adapter's own matrices\n"
    )
    assert ran.code == 2
