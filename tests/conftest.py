"""Fixtures: small checkpoints made on the spot, and the command line called in-process."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

import expo as door
from expo.cli.main import main
from expo.planning.plan import Plan
from expo.results import MergeResult
from expo.verbs.running import run_plans

if TYPE_CHECKING:
    from .clean import Clean

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

pytest_plugins = ("tests.publishing",)

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # where it is ignored, children ignore it too
torch.set_num_threads(1)  # of models this small, two only wait for each other

Tensors = dict[str, torch.Tensor]

extrapolate = partial(door.extrapolate, verify=False)
"""For made-up tensors that no model has."""


def run_plan(plan: Plan, out: Path, **how: Any) -> MergeResult:
    """`run_plans` of one."""
    (result,) = run_plans([plan], [out], **how)
    return result


CONFIG = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 12}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: float = 0.02) -> Tensors:
    """Tensors of a tiny two-layer model with awkward sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (12, 10),
        "model.layers.0.self_attn.q_proj.weight": (10, 10),
        "model.layers.0.mlp.up_proj.weight": (33, 10),
        "model.layers.0.input_layernorm.weight": (10,),
        "model.layers.1.self_attn.q_proj.weight": (10, 10),
        "model.layers.1.mlp.up_proj.weight": (33, 10),
        "model.layers.1.input_layernorm.weight": (10,),
        "model.norm.weight": (10,),
        "lm_head.weight": (12, 10),
    }
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for name, shape in shapes.items()
    }


def nudged(tensors: Tensors, seed: int = 1, scale: float = 1e-3) -> Tensors:
    """The tensors with a small change, in the same dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.double() + torch.randn(t.shape, generator=generator, dtype=torch.float64) * scale)
        .to(t.dtype)
        for name, t in tensors.items()
    }  # fmt: skip


def write_checkpoint(
    folder: Path, tensors: Tensors, *, shards: int = 1, config: dict | None = None
) -> Path:
    """Save tensors the way the Hub has them: one file, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclass(frozen=True)
class Pair:
    sft: Path
    aligned: Path
    sft_tensors: Tensors
    aligned_tensors: Tensors


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A bfloat16 pair: the SFT model in one file, the aligned one in three."""
    sft = weights()
    aligned = nudged(sft)
    return Pair(
        write_checkpoint(tmp_path / "sft", sft),
        write_checkpoint(tmp_path / "aligned", aligned, shards=3),
        sft,
        aligned,
    )


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> "Clean":
    from .clean import make_clean

    return make_clean(tmp_path_factory.mktemp("openchat"))


@pytest.fixture
def folder(clean: "Clean", tmp_path: Path) -> Iterator[Path]:
    """A copy of the clean merge, to be changed."""
    shutil.copytree(clean.out, tmp_path / "out")
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def expo(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process: `expo("plan", sft, aligned)`.

    Merges of made-up tensors are not verified, unless a test asks for it: no model has these shapes.
    """

    def run(*arguments: object, verify: bool = False) -> Ran:
        capfd.readouterr()
        words = [str(argument) for argument in arguments]
        is_merge = words[0] in ("extrapolate", "laser", "merge")
        if is_merge and not verify and not {"--help", "--as-adapter"} & {*words}:
            words.append("--no-verify")
        with pytest.raises(SystemExit) as exit_:
            main(words)
        out, err = capfd.readouterr()
        return Ran(exit_.value.code or 0, out, err)  # type: ignore[arg-type]

    return run
