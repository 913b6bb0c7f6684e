"""What is asked for and has no effect is warned of, or refused: in the plan, on stderr and in the manifest."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch

import expo as door
from expo.cli.outcome import outcome
from expo.demo.toy import MODELS

from .conftest import CONFIG, Pair, Ran, extrapolate, nudged, weights, write_checkpoint
from .test_plan import tokenizer

SFT, ALIGNED = MODELS / "sft", MODELS / "aligned"


def said(pair: tuple[Path, Path], out: Path, expo: Callable[..., Ran], *flags: object) -> str:
    """A warning that plan, run and manifest have in common."""
    planned = expo("plan", *pair, "--alpha", 1.5, *flags, "--json")
    assert planned.code == 0, planned.err
    ran = expo("extrapolate", *pair, out, "--alpha", 1.5, *flags)
    assert ran.code == 0, ran.err
    (warning,) = (w for w in json.loads(planned.out)["warnings"] if "tokenizer" not in w)
    assert f"warning: {warning}\n" in ran.err
    assert warning in json.loads((out / "expo.json").read_text())["warnings"]
    return warning


def test_patterns_that_fit_nothing(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    sides = pair.sft, pair.aligned
    assert said(sides, tmp_path / "a", expo, "--include", "nosuch*") == (
        "--include nosuch* fits no file of aligned: nothing is added"
    )
    assert said(sides, tmp_path / "b", expo, "--allow-missing", "nosuch") == (
        "--allow-missing nosuch fits no tensor that only some models have"
    )


@pytest.mark.parametrize("method", ["expo", "slerp", "model_stock"])
def test_filters_that_fit_nothing(method: str, pair: Pair) -> None:
    filters = [{"filter": "self_atn", "value": 1.2}, {"filter": "mlp", "value": 1}, {"value": 1.5}]
    key = {"expo": "alpha", "slerp": "t", "model_stock": "filter_wise"}[method]
    spec = {
        "merge_method": method,
        "base_model": str(pair.sft),
        "models": [{"model": str(pair.aligned)}],
        "parameters": {key: filters},
    }
    if method == "model_stock":
        spec["parameters"] = {"filter_wise": [{"filter": "self_atn", "value": True}, {"value": False}]}  # fmt: skip
        other = write_checkpoint(pair.sft.with_name("other"), nudged(pair.sft_tensors, 5))
        spec["models"] = [{"model": str(pair.aligned)}, {"model": str(other)}]
    report = door.plan(spec)
    assert report.ok, report.refusals
    (warning,) = (w for w in report.warnings if "filter" in w)
    donor = "aligned" if method == "expo" else "sft"
    assert warning == (
        f"filter self_atn fits no tensor of {donor}: its value has no effect (did you mean "
        "self_attn?)"
    )


def test_a_filter_behind_one_that_fits_everything(pair: Pair) -> None:
    alpha = [{"value": 1.5}, {"filter": "mlp", "value": 2}]
    parameters = {"alpha": alpha}
    models = [{"model": str(pair.aligned), "parameters": parameters}]
    spec = {"merge_method": "expo", "base_model": str(pair.sft), "models": models}
    assert door.plan(spec).warnings[0] == (
        "spec: models.0.parameters.alpha.1: has no effect: the entry before it fits every tensor"
    )


def low_rank(**edit: object) -> dict:
    return {
        "merge_method": "expo",
        "base_model": str(SFT),
        "models": [{"model": str(ALIGNED), "parameters": {"alpha": 1.5}}],
        "transforms": [{"low_rank": edit}],
    }


def test_targets_that_find_nothing() -> None:
    report = door.plan(low_rank(keep="rank=2", target="nosuch"))
    assert report.ok
    assert report.warnings == (
        "target 'nosuch' finds no matrix of aligned that it could cut: `expo spectrum MODEL --target "
        "REGEX` shows what a pattern finds",
    )
    fixed = low_rank(keep="rank=2") | {"fix_first_layers": 2}
    assert "the edit finds no matrix of aligned that it could cut" in door.plan(fixed).warnings[0]
    edits = [{"laser": {"keep": "rank=2", "target": t}} for t in ("nosuch", "q_proj")]
    one = {"merge_method": "passthrough", "models": [{"model": str(ALIGNED)}], "edits": edits}
    assert "target 'nosuch' finds no matrix" in door.plan(one).warnings[0]
    assert "target 'nosuch' finds" in door.plan(one | {"edits": edits[:1]}).refusals[0]


def test_ranks_that_matrices_do_not_have(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    assert door.plan(low_rank(keep="rank=999")).warnings == (
        "rank=999: 14 of 14 matrices have no higher rank (at most 64), nothing of them is cut",
    )
    assert door.plan(low_rank(keep="rank=40")).warnings == (
        "rank=40: 4 of 14 matrices have no higher rank (at most 32), nothing of them is cut",
    )
    assert door.plan(low_rank(keep="rank=31")).warnings == ()
    ran = expo("laser", ALIGNED, tmp_path / "out", "--keep", "rank=64")
    assert "warning: rank=64: 14 of 14 matrices" in ran.err
    assert "got    0 of 14 matrices cut" in ran.out
    ran = expo("extract-lora", ALIGNED, tmp_path / "lora", "--minus", SFT, "--rank", 40)
    assert ran.err.startswith("warning: rank=40: 4 of 14 matrices have no higher rank (at most 32)")
    held = json.loads((tmp_path / "lora" / "expo.json").read_text())["warnings"]
    assert held[0].startswith("rank=40: 4 of 14")


def test_the_same_model_on_both_sides(pair: Pair, tmp_path: Path, expo: Callable[..., Ran]) -> None:
    copytree(pair.sft, tmp_path / "copy")
    same = "SFT and aligned hold the same weights (sft"
    for other, labels in (("sft", ")"), (".." + f"/{tmp_path.name}/sft", ")"), ("copy", " and copy)")):  # fmt: skip
        aligned = tmp_path / other
        told = said((pair.sft, aligned), tmp_path / f"o{len(other)}", expo)
        assert told == f"{same}{labels}: alpha changes nothing"
    tensors = {**pair.sft_tensors, "model.norm.weight": torch.ones(10).bfloat16()}
    write_checkpoint(tmp_path / "copy", tensors)
    assert not [w for w in plan_warnings(pair.sft, tmp_path / "copy") if same in w]


def plan_warnings(sft: Path, aligned: Path) -> tuple[str, ...]:
    models = [{"model": str(aligned), "parameters": {"alpha": 1.5}}]
    return door.plan({"merge_method": "expo", "base_model": str(sft), "models": models}).warnings


def test_what_only_the_run_can_tell(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    """Two models of the same numbers in other dtypes."""
    sft = weights()
    write_checkpoint(tmp_path / "sft", sft)
    write_checkpoint(tmp_path / "aligned", {name: t.float() for name, t in sft.items()})
    assert len(plan_warnings(tmp_path / "sft", tmp_path / "aligned")) == 1  # no tokenizer
    ran = expo("extrapolate", tmp_path / "sft", tmp_path / "aligned", tmp_path / "o", "--alpha", 2)
    assert "warning: SFT and aligned hold the same weights (sft and aligned)" in ran.err
    assert "ExPO, alpha 2 (paper alpha 1)" in ran.out
    assert "got    SFT and aligned do not differ, so alpha changed nothing" in ran.out


def test_no_tensor_on_both_sides_is_refused(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    other = {f"gpt.{name}": tensor for name, tensor in pair.sft_tensors.items()}
    write_checkpoint(tmp_path / "other", other)
    for flags in ((), ("--allow-missing", ".*")):
        ran = expo(
            "extrapolate",
            tmp_path / "other",
            pair.aligned,
            tmp_path / "out",
            "--alpha",
            1.5,
            *flags,
        )
        assert ran.code == 1
        assert ran.err == (
            "expo: no tensor is in both models (other and aligned): there is nothing to extrapolate; "
            "is this the SFT model that the aligned one was trained from?\n"
        )
    for alpha in (0, 1):  # these are copies, of tensors that are on both sides
        assert expo("extrapolate", pair.sft, pair.aligned, tmp_path / f"{alpha}", "--alpha", alpha).code == 0  # fmt: skip


def test_everything_fixed_is_a_copy_and_said(pair: Pair, tmp_path: Path) -> None:
    spec = {
        "merge_method": "expo",
        "base_model": str(pair.sft),
        "models": [{"model": str(pair.aligned), "parameters": {"alpha": 1.5}}],
        "fix_first_layers": 2,
        "exclude": ["embeddings", "head", "norms"],
    }
    result = door.merge(spec, tmp_path / "out", verify=False)
    assert "no tensor is extrapolated: all are left out, fixed" in result.warnings[0]
    assert outcome(result).endswith("every tensor is a copy of the aligned model's")


def test_the_cut_is_part_of_what_is_said(tmp_path: Path) -> None:
    result = door.merge(low_rank(keep="rank=2"), tmp_path / "out", verify=False)
    exact, other = result.statistics.alpha, result.alternative
    assert result.alpha_range == (1.5, 1.5)
    assert exact is not None
    assert exact < 1.4
    assert other is not None
    assert other.effective_alpha == pytest.approx(exact, abs=0.03)
    assert f"asked alpha 1.5 (paper alpha 0.5), {exact:.4g} after the cut; " in outcome(result)


def test_sentences_mean_something(pair: Pair, tmp_path: Path) -> None:
    def line(**spec: object) -> str:
        return outcome(door.merge(spec, tmp_path / f"out{len(list(tmp_path.iterdir()))}", verify=False))  # fmt: skip

    model = {"model": str(pair.sft)}
    assert line(merge_method="passthrough", models=[model]) == "passthrough: nothing was changed"
    ties = line(
        merge_method="ties", base_model=str(pair.sft), models=[{"model": str(pair.aligned), "parameters": {"weight": 0}}],
    )  # fmt: skip
    assert ties == "ties: nothing was changed: the models are equal, or weigh 0"
    cut = line(merge_method="passthrough", models=[model], edits=[{"laser": {"keep": "rank=2"}}])
    assert cut.startswith("cut 4 of 4 matrices: rank 2 of up to 10, ")


def test_rows_that_are_dropped_are_said_by_the_run(
    tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    sft, aligned = weights(), nudged(weights())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        sft[name] = torch.cat([sft[name], torch.randn(2, 10).bfloat16()])
    folders = [write_checkpoint(tmp_path / n, t) for n, t in (("sft", sft), ("aligned", aligned))]
    tokens = [f"t{i}" for i in range(12)]
    tokenizer(folders[0], [*tokens, "more", "yet"])
    tokenizer(folders[1], tokens)
    ran = expo("extrapolate", *folders, tmp_path / "out", "--alpha", 1.5)
    assert ran.code == 0, ran.err
    dropped = "note: 2 embedding rows only in the SFT model: dropped: 12 more, 13 yet\n"
    assert dropped in ran.err
    result = extrapolate(*folders, tmp_path / "again", alpha=1.5)
    assert f"note: {result.notes[0]}\n" == dropped


@pytest.mark.parametrize(
    ("made_for", "name", "warns"),
    [
        ("org/sft", None, False),
        ("/home/me/SFT/", None, False),
        (r"C:\models\sft", None, False),
        ("", None, False),
        ("org/elsewhere", "org/elsewhere", False),
        ("org/elsewhere", None, True),
        ("org/elsewhere", "org/third", True),
    ],
)
def test_an_adapter_of_another_base(
    made_for: str, name: str | None, warns: bool, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    config = CONFIG | ({"_name_or_path": name} if name else {})
    write_checkpoint(tmp_path / "sft", weights(), config=config)
    write_checkpoint(tmp_path / "aligned", nudged(weights()))
    lora = tmp_path / "lora"
    door.extract_lora(tmp_path / "aligned", lora, minus=tmp_path / "sft", rank=2)
    edited = json.loads((lora / "adapter_config.json").read_text())
    assert edited["base_model_name_or_path"] == "sft"
    (lora / "adapter_config.json").write_text(json.dumps(edited | {"base_model_name_or_path": made_for}))  # fmt: skip
    sft = str(tmp_path / "sft")
    told = (
        "adapter lora was made for org/elsewhere, here it is added to sft: is that the same model?"
    )
    out = tmp_path / "out"
    assert (told in plan_warnings(Path(sft), Path(f"{sft}+{lora}"))) is warns
    ran = expo("extrapolate", sft, f"{sft}+{lora}", out, "--alpha", 1.5)
    assert (f"warning: {told}\n" in ran.err) is warns
    assert (told in json.loads((out / "expo.json").read_text())["warnings"]) is warns


def test_nothing_is_said_where_all_is_well(pair: Pair, tmp_path: Path) -> None:
    result = extrapolate(pair.sft, pair.aligned, tmp_path / "out", alpha=1.5)
    assert [w for w in result.warnings if "tokenizer" not in w] == []
    assert result.engine == "expo"
