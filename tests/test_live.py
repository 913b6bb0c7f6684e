"""The live model: its weights are, bit for bit, those of the output on the disk."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import expo
from expo.demo.toy import MODELS
from expo.errors import CheckpointError, OutputError
from expo.planning.build import build_plan
from expo.planning.plan import Plan
from expo.sampling import live as room
from expo.sampling.live import Live, build
from expo.sampling.resident import keep_resident
from expo.spec.request import make_request

from .families import FAMILIES, Family, write_family

pytestmark = pytest.mark.filterwarnings("ignore")

MIXTRAL = Family(
    None, "mixtral", spare_rows=0, tiny=FAMILIES["gemma"].tiny | {"num_local_experts": 3}
)
TIED = Family(FAMILIES["mistral"].template, "gemma2", spare_rows=1)


def nudge(folder: Path) -> None:
    """Another model of the same shapes."""
    file = folder / "model.safetensors"
    tensors = {n: (t.float() * 1.01 + 1e-3).to(t.dtype) for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def a_pair(tmp_path: Path, family: Family) -> tuple[Path, Path]:
    sft = write_family(tmp_path / "sft", family)
    aligned = tmp_path / "aligned"
    shutil.copytree(sft, aligned)
    nudge(aligned)
    return sft, aligned


def from_disk(plan: Plan, out: Path) -> dict[str, torch.Tensor]:
    """What transformers loads of the output that is written."""
    from transformers import AutoModelForCausalLM

    expo.merge(plan.request, out, verify=False)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()


def check(live: Live, plan: Plan, out: Path) -> None:
    wanted, weights = from_disk(plan, out), live.model.state_dict()
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert weights[name].dtype == tensor.dtype
        assert weights[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("family", "in_place"),
    [(FAMILIES["phi-3"], True), (MIXTRAL, False), (TIED, True), (FAMILIES["gpt-2"], True)],
    ids=["fused in the file", "fused by the loader", "tied", "transposed"],
)
def test_the_weights_are_the_outputs(tmp_path: Path, family: Family, in_place: bool) -> None:
    plan = build_plan(make_request(*map(str, a_pair(tmp_path, family))))
    live = build(plan.at(1.0))
    places = {name: w.data_ptr() for name, w in live.model.state_dict().items()}
    assert bool(live.slots) is in_place
    for alpha in (1.5, 1.0):
        live.set(plan.at(alpha))
        check(live, plan.at(alpha), tmp_path / f"out-{alpha}")
    assert places == {name: w.data_ptr() for name, w in live.model.state_dict().items()}


def with_other_rows(tmp_path: Path) -> tuple[Path, Path]:
    """The demo pair; in the aligned model two tokens have changed places and one is new."""
    sft, aligned = tmp_path / "sft", tmp_path / "aligned"
    for folder in (sft, aligned):
        shutil.copytree(MODELS / folder.name, folder)
    content = json.loads((aligned / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    vocabulary["!"] = len(vocabulary)
    (aligned / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_file(aligned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((aligned / "config.json").read_text()) | {"vocab_size": 35}
    (aligned / "config.json").write_text(json.dumps(config))
    return sft, aligned


def test_rows_matched_by_token(tmp_path: Path) -> None:
    plan = build_plan(make_request(*map(str, with_other_rows(tmp_path))))
    assert any(job.rows for job in plan.jobs)
    live = build(plan.at(1.0))
    live.set(plan.at(1.7))
    check(live, plan.at(1.7), tmp_path / "out")


@pytest.mark.parametrize("more", [{"dtype": "float32"}, {"rounding": "stochastic", "seed": 7}])
def test_dtype_and_rounding_are_the_requests(tmp_path: Path, more: dict) -> None:
    plan = build_plan(make_request(str(MODELS / "sft"), str(MODELS / "aligned"), **more))
    live = build(plan.at(1.0))
    live.set(plan.at(1.3))
    check(live, plan.at(1.3), tmp_path / "out")


@pytest.mark.parametrize("rows", [False, True])
def test_resident_weights_give_the_same_bits(tmp_path: Path, rows: bool) -> None:
    """What a GPU does, on this processor: both sides are kept, and α is changed where they are."""
    sft, aligned = with_other_rows(tmp_path) if rows else (MODELS / "sft", MODELS / "aligned")
    plan = build_plan(make_request(str(sft), str(aligned)))
    live = build(plan.at(1.0))
    assert not live.resident
    live.resident = keep_resident(plan.at(1.0), live.slots)
    assert len(live.resident) == (19 if rows else 21)
    for alpha in (1.7, 0.0, -2.3, 1.0):
        live.set(plan.at(alpha))
        check(live, plan.at(alpha), tmp_path / f"out{alpha}")
    with pytest.raises(CheckpointError, match="a weight is not finite at this alpha"):
        live.set(plan.at(1e300))


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    for side in ("sft", "aligned"):
        shutil.copytree(MODELS / side, tmp_path / side)
        file = tmp_path / side / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    plan = build_plan(make_request(str(tmp_path / "sft"), str(tmp_path / "aligned")))
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        build(plan.at(1.0))


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    for side in ("sft", "aligned"):
        shutil.copytree(MODELS / side, tmp_path / side)
        config = json.loads((tmp_path / side / "config.json").read_text())
        (tmp_path / side / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    plan = build_plan(make_request(str(tmp_path / "sft"), str(tmp_path / "aligned")))
    with pytest.raises(CheckpointError, match="does not load through transformers: ") as caught:
        build(plan.at(1.0))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_not_blamed_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "write_small_files", write)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = build_plan(make_request(str(MODELS / "sft"), str(MODELS / "aligned")))
    with pytest.raises(OutputError, match=f"the disk of {tmp_path} is full: make room and run"):
        build(plan.at(1.0))
