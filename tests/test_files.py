"""Models that are none of transformers': single files, and directories with weights alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expo as door
from expo.errors import CheckpointError, OutputError, SpecError
from expo.output.staging import Staging

from .conftest import Ran, Tensors, nudged, write_checkpoint

Expo = Callable[..., Ran]


def unet(seed: int = 0) -> Tensors:
    """Names, shapes and dtypes of a diffusion model: convolutions, a float32 norm, a counter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv_in.weight": (4, 3, 3, 3),
        "down.0.attn.to_q.weight": (16, 16),
        "down.0.bias": (7,),
    }
    tensors = {name: torch.randn(s, generator=generator).half() for name, s in shapes.items()}
    tensors["conv1d.weight"] = torch.randn(6, 4, 3, generator=generator)
    return tensors | {"norm.weight": torch.randn(5, generator=generator)}


@pytest.fixture
def tensors() -> tuple[Tensors, Tensors]:
    sft = unet()
    return sft, nudged(sft, scale=1e-2)


@pytest.fixture
def files(tensors: tuple[Tensors, Tensors], tmp_path: Path) -> tuple[Path, Path]:
    metadata = {"modelspec.title": "a picture", "modelspec.hash_sha256": "0x00", "ss_steps": "7"}
    for name, held in zip(("sft", "aligned"), tensors, strict=True):
        save_file(held, tmp_path / f"{name}.safetensors", metadata=metadata)
        (tmp_path / f"{name}.safetensors").chmod(0o644)
    return tmp_path / "sft.safetensors", tmp_path / "aligned.safetensors"


def directories(tensors: tuple[Tensors, Tensors], folder: Path, layout: str) -> tuple[Path, Path]:
    """Both sides in a `layout` that has no config.json of transformers'."""
    for name, held in zip(("sft", "aligned"), tensors, strict=True):
        place = folder / name
        place.mkdir()
        names = sorted(held)
        parts = {"diffusion_pytorch_model.safetensors": names}
        if layout in ("several", "index"):
            parts = {"first.safetensors": names[:2], "second.safetensors": names[2:]}
        for file, inside in parts.items():
            save_file({n: held[n] for n in inside}, place / file, metadata={"format": "pt"})
            (place / file).chmod(0o644)
        if layout == "index":
            weight_map = {n: file for file, inside in parts.items() for n in inside}
            size = sum(t.nbytes for t in held.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            path = place / "diffusion_pytorch_model.safetensors.index.json"
            path.write_text(json.dumps(index))
        if layout == "diffusers":
            config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
            (place / "config.json").write_text(json.dumps(config))
    return folder / "sft", folder / "aligned"


def assert_extrapolated(result: Tensors, tensors: tuple[Tensors, Tensors], alpha: float) -> None:
    """Against float64: half a step of the dtype away at most, and float32's error."""
    sft, aligned = tensors
    assert result.keys() == aligned.keys()
    for name, tensor in result.items():
        exact = sft[name].double() + alpha * (aligned[name].double() - sft[name].double())
        assert tensor.dtype == aligned[name].dtype
        bound = exact.abs() * torch.finfo(tensor.dtype).eps + 1e-6
        assert torch.all((tensor.double() - exact).abs() <= bound), name


def load(folder: Path) -> Tensors:
    return {
        n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()
    }


def test_two_files_make_one_file(
    files: tuple[Path, Path], tensors: tuple[Tensors, Tensors], tmp_path: Path, expo: Expo
) -> None:
    out = tmp_path / "out.safetensors"
    ran = expo("extrapolate", *files, out, "--alpha", "1.3", verify=True)
    assert ran.code == 0, ran.err
    assert "out.safetensors: verified" in ran.out
    assert "no model of transformers" in ran.err
    assert_extrapolated(load_file(out), tensors, 1.3)
    beside = [path.name for path in tmp_path.iterdir() if "out" in path.name]
    assert sorted(beside) == ["out.safetensors", "out.safetensors.expo.json"]
    with safe_open(out, "pt") as opened:  # what was said of the other tensors' bytes is gone
        assert opened.metadata() == {"modelspec.title": "a picture", "ss_steps": "7"}
    manifest = json.loads((tmp_path / "out.safetensors.expo.json").read_text())
    assert list(manifest["files"]) == ["out.safetensors"]
    assert manifest["sources"]["aligned"]["model"] == "aligned.safetensors"


def test_one_file_is_verified_known_and_compared(
    files: tuple[Path, Path], tmp_path: Path, expo: Expo
) -> None:
    out = tmp_path / "out.safetensors"
    door.extrapolate(*files, out, alpha=1.3)
    ran = expo("verify", out, "--against", files[1], "-v")
    assert ran.code == 0, ran.out
    assert "not checked, there is no config.json" in " ".join(ran.out.split())
    info = expo("info", out)
    assert "asked alpha 1.3 (paper alpha 0.3)" in info.out
    assert "tokenizer" not in info.out
    diff = expo("diff", files[0], out)
    assert diff.code == 0
    assert "sft.safetensors → out.safetensors" in diff.out
    assert "zephyr" not in diff.out  # distances of language models
    spectrum = expo("spectrum", out, "--minus", files[0]).out
    assert "down.0.attn.to_q.weight" in spectrum
    assert "conv1d" not in spectrum  # a kernel is no stack of experts
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    ran = expo("verify", out)
    assert ran.code == 3
    assert "out.safetensors" in ran.out


@pytest.mark.parametrize("layout", ["one", "several", "index", "diffusers"])
def test_directories_of_weights(
    tensors: tuple[Tensors, Tensors], tmp_path: Path, expo: Expo, layout: str
) -> None:
    sft, aligned = directories(tensors, tmp_path, layout)
    out = tmp_path / "out"
    ran = expo("extrapolate", sft, aligned, out, "--alpha", "1.3", verify=True)
    assert ran.code == 0, ran.err
    assert_extrapolated(load(out), tensors, 1.3)
    donors = {path.name for path in aligned.iterdir()}
    assert {path.name for path in out.iterdir()} == donors | {"README.md", "expo.json"}
    card = (out / "README.md").read_text()
    assert "transformers" not in card
    for words in ((out,), (out, "--against", aligned), (aligned,)):
        ran = expo("verify", *words)
        assert ran.code == 0, ran.out
    assert expo("diff", sft, out).code == 0


def test_dtype_leaves_a_config_of_others_alone(
    tensors: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    sft, aligned = directories(tensors, tmp_path, "diffusers")
    door.extrapolate(sft, aligned, tmp_path / "out", alpha=1.3, dtype="float32")
    config = (tmp_path / "out" / "config.json").read_bytes()
    assert config == (aligned / "config.json").read_bytes()


def test_files_into_a_directory_and_directories_into_a_file(
    files: tuple[Path, Path], tensors: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    door.extrapolate(*files, tmp_path / "folder", alpha=1.3)
    assert_extrapolated(load(tmp_path / "folder"), tensors, 1.3)
    pair = directories(tensors, tmp_path, "several")
    door.extrapolate(*pair, tmp_path / "one.safetensors", alpha=1.3)
    assert_extrapolated(load_file(tmp_path / "one.safetensors"), tensors, 1.3)


def test_several_files_from_one_read(
    files: tuple[Path, Path], tensors: tuple[Tensors, Tensors], tmp_path: Path, expo: Expo
) -> None:
    ran = expo("extrapolate", *files, tmp_path / "out.safetensors", "--alphas", "1.2,2")
    assert ran.code == 0, ran.err
    for alpha, name in ((1.2, "out-alpha-1.2.safetensors"), (2.0, "out-alpha-2.safetensors")):
        assert_extrapolated(load_file(tmp_path / name), tensors, alpha)


def test_a_file_that_is_there_is_replaced_only_when_asked(
    files: tuple[Path, Path], tensors: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    door.extrapolate(*files, out, alpha=1.3)
    with pytest.raises(OutputError, match="exists: choose another, or add --overwrite"):
        door.extrapolate(*files, out, alpha=2.0)
    assert_extrapolated(load_file(out), tensors, 1.3)
    door.extrapolate(*files, out, alpha=2.0, overwrite=True)
    assert_extrapolated(load_file(out), tensors, 2.0)
    out.write_text("notes of mine")
    with pytest.raises(OutputError, match="holds no model"):
        door.extrapolate(*files, out, alpha=2.0, overwrite=True)
    assert out.read_text() == "notes of mine"
    with pytest.raises(OutputError, match="overlaps the input"):
        door.extrapolate(*files, files[1], alpha=2.0, overwrite=True)


def test_a_file_of_a_killed_run_is_finished_by_the_next(
    files: tuple[Path, Path],
    tensors: tuple[Tensors, Tensors],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "discard", lambda _: None)
        patch.setattr(Path, "replace", _killed)
        with pytest.raises(KeyboardInterrupt):
            door.extrapolate(*files, out, alpha=1.3)
    assert not out.exists()
    door.extrapolate(*files, out, alpha=1.3)
    assert_extrapolated(load_file(out), tensors, 1.3)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("goes_on", [(), ("--join",), ("--worker", "0/1")])
def test_a_file_that_a_killed_run_was_to_replace(
    goes_on: tuple[str, ...],
    files: tuple[Path, Path],
    tensors: tuple[Tensors, Tensors],
    tmp_path: Path,
    expo: Expo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out.safetensors"
    door.extrapolate(*files, out, alpha=1.2)
    asked = ("extrapolate", *files, out, "--alpha", 1.3, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _killed)
        assert expo(*asked).code == 130
    assert_extrapolated(load_file(out), tensors, 1.2)
    ran = expo(*asked, *goes_on)
    assert ran.code == 0, ran.err
    assert_extrapolated(load_file(out), tensors, 1.3)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("goes_on", [(), ("--join",), ("--worker", "0/1")])
def test_a_run_that_was_killed_when_its_file_was_placed(
    goes_on: tuple[str, ...],
    files: tuple[Path, Path],
    tensors: tuple[Tensors, Tensors],
    tmp_path: Path,
    expo: Expo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out.safetensors"
    asked = ("extrapolate", *files, out, "--alpha")
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "discard", lambda _: None)
        assert expo(*asked, 1.3).code == 0
    assert list(tmp_path.glob(".out*"))
    ran = expo(*asked, 1.3, *goes_on)
    assert ran.code == 0, ran.err
    assert not list(tmp_path.glob(".out*"))
    ran = expo(*asked, 1.4, *goes_on)
    assert ran.code == 1
    assert "exists: choose another, or add --overwrite" in ran.err
    assert_extrapolated(load_file(out), tensors, 1.3)


def test_a_manifest_without_its_file_is_not_taken_for_it(
    files: tuple[Path, Path],
    tensors: tuple[Tensors, Tensors],
    tmp_path: Path,
    expo: Expo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("extrapolate", *files, tmp_path / "o.safetensors", "--alphas", "1.2,1.3")
    second = tmp_path / "o-alpha-1.3.safetensors"

    def killed(self: Path, target: Path) -> Path:
        if target == second:
            raise KeyboardInterrupt
        return self.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert expo(*asked).code == 130
    assert second.with_name(f"{second.name}.expo.json").exists()
    ran = expo(*asked)
    assert ran.code == 0, ran.err
    assert "there already, of this very merge: o-alpha-1.2.safetensors\n" in ran.err
    assert_extrapolated(load_file(second), tensors, 1.3)


def _killed(self: Path, target: Path) -> Path:
    if target.name == "out.safetensors":
        raise KeyboardInterrupt
    return self.rename(target)


def test_what_one_file_cannot_hold(files: tuple[Path, Path], tmp_path: Path, expo: Expo) -> None:
    for name in ("x", "y"):
        write_checkpoint(tmp_path / name, unet())
    out = tmp_path / "out.safetensors"
    asked = ("extrapolate", tmp_path / "x", tmp_path / "y", out, "--alpha", "1.3")
    ran = expo(*asked)
    assert ran.code == 1
    assert "y needs more to load (config.json): name a directory, like out" in ran.err
    assert expo(*asked, "--dry-run").code == 1
    ran = expo("extrapolate", *files, out, "--alpha", "1.3", "--max-shard-size", "5MB")
    assert ran.code == 1
    assert "--max-shard-size is for several" in ran.err
    assert not out.exists()


def test_what_is_no_model_of_its_own(
    tensors: tuple[Tensors, Tensors], tmp_path: Path, expo: Expo
) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(SpecError, match=r"or a \.safetensors file"):
        door.diff(tmp_path / "text.txt", tmp_path / "text.txt")
    pipeline, _ = directories(tensors, tmp_path, "diffusers")
    shutil.copytree(pipeline, tmp_path / "pipe" / "unet")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="name one of them, like pipe/unet"):
        door.diff(tmp_path / "pipe", tmp_path / "pipe")
    assert door.diff(tmp_path / "pipe" / "unet", pipeline).total.delta_norm == 0
    short = tmp_path / "short"
    short.mkdir()
    save_file(unet(), short / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"no model-00002-of-00002\.safetensors: download"):
        door.diff(short, short)
    ran = expo("verify", short)
    assert ran.code == 3
    assert "model-00002-of-00002.safetensors is missing" in ran.out
    (tmp_path / "lm").mkdir()  # of a language model the index is missing, not the configuration
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "llama"}')
    save_file(unet(), tmp_path / "lm" / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        door.diff(tmp_path / "lm", tmp_path / "lm")


@pytest.mark.parametrize("name", ["to_q.lora_A.weight", "lora_unet_to_q.lora_up.weight"])
def test_factors_are_no_weights(tmp_path: Path, expo: Expo, name: str) -> None:
    for seed, side in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(4, 8, generator=generator)
        save_file({name: factor}, tmp_path / f"{side}.safetensors")
    ran = expo("plan", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert f"b.safetensors holds factors of a LoRA adapter ({name})" in ran.out


def test_a_link_to_a_file_leads_to_it(
    files: tuple[Path, Path], tensors: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "there.safetensors")
    door.extrapolate(*files, tmp_path / "link.safetensors", alpha=1.3)
    assert_extrapolated(load_file(tmp_path / "there.safetensors"), tensors, 1.3)


def test_a_file_is_not_published(files: tuple[Path, Path], expo: Expo) -> None:
    ran = expo("publish", files[0], "me/model", "--license", "mit", "--dry-run")
    assert ran.code == 2
    assert "sft.safetensors is a file, not a model directory" in ran.err
    assert "is no directory" in expo("card", files[0]).err


def test_a_file_that_is_cut_short_is_named_once(files: tuple[Path, Path], expo: Expo) -> None:
    files[1].write_bytes(files[1].read_bytes()[:-10])
    ran = expo("diff", *files)
    assert ran.code == 1
    assert ran.err.startswith("expo: aligned.safetensors ")
