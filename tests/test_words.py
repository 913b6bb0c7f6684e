"""Messages name what is wrong in the words of the verb that was called, with a cure that is one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import Pair, Ran, write_checkpoint


def test_a_target_that_finds_nothing_is_told_what_there_is(
    pair: Pair, expo: Callable[..., Ran]
) -> None:
    ran = expo("spectrum", pair.sft, "--target", "self_atn")
    assert ran.code == 1
    assert ran.err == (
        "expo: --target 'self_atn' finds no matrix of sft: "
        "it has embed_tokens, lm_head, mlp.up_proj, self_attn.q_proj\n"
    )


def test_a_model_without_layers_is_told_of_the_flag(
    tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    model = write_checkpoint(tmp_path / "m", {"lm_head.weight": torch.ones(4, 4)})
    ran = expo("spectrum", model)
    assert ran.err == "expo: m has no matrix in its layers: --target REGEX names others\n"


def test_diff_knows_no_sft_model(pair: Pair, expo: Callable[..., Ran]) -> None:
    """It compares any two: their names stand for them."""
    changed = pair.sft_tensors | {"model.norm.weight": torch.ones(9).bfloat16()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed[name] = torch.cat([changed[name], changed[name][:2]])
    write_checkpoint(pair.sft, changed)
    for folder, tokens in ((pair.sft, 14), (pair.aligned, 12)):
        ids = ", ".join(f'"t{n}": {n}' for n in range(tokens))
        (folder / "vocab.json").write_text(f"{{{ids}}}")
    ran = expo("diff", pair.sft, pair.aligned)
    assert ran.code == 3
    assert "model.norm.weight ([9] in sft, [10] in aligned)" in ran.out
    assert "note: 2 embedding rows only in sft: 12 t12, 13 t13" in ran.out
    assert "SFT model" not in ran.out + ran.err


def test_diff_of_a_damaged_model_names_it(pair: Pair, expo: Callable[..., Ran]) -> None:
    write_checkpoint(
        pair.sft, pair.sft_tensors | {"model.norm.weight": torch.full((10,), torch.inf).bfloat16()}
    )
    ran = expo("diff", pair.sft, pair.aligned)
    assert ran.err == "expo: model.norm.weight holds NaN or Inf in sft: it is damaged\n"


def test_extract_lora_has_no_allow_missing_and_names_none(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    write_checkpoint(pair.sft, pair.sft_tensors | {"only.here": torch.ones(2)})
    ran = expo("extract-lora", pair.aligned, tmp_path / "a", "--minus", pair.sft, "--rank", 2)
    assert ran.code == 1
    assert ran.err == (
        "expo: sft and aligned do not hold the same tensors (only.here): "
        "is --minus the model that the other was trained from?\n"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("starling-lm-7b-bet-expo", "is neither a file nor a recipe (did you mean starling-lm-7b-beta-expo?)"),
        ("starling-lm-7b-beta-expo.yml", "does not exist (did you mean the recipe starling-lm-7b-beta-expo?)"),
        ("zephyr-7b-bta-expo.yml", "does not exist (did you mean zephyr-7b-beta-expo?)"),
        ("storm", "is neither a file nor a recipe (recipes that begin so: storm-7b-collapse)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", [("plan",), ("merge",)])
def test_a_recipe_mistyped(
    verb: tuple[str], name: str, says: str, expo: Callable[..., Ran], tmp_path: Path
) -> None:
    out = (tmp_path / "out",) if verb == ("merge",) else ()
    ran = expo(*verb, name, *out)
    assert ran.err == f"expo: {name} {says}; expo merge --list shows the recipes\n"
    assert ran.code == 2


def test_titles_of_recipes_are_whole_sentences(expo: Callable[..., Ran]) -> None:
    lines = expo("merge", "--list").out.splitlines()
    assert len(lines) > 20
    assert all(line.endswith(".") for line in lines)


def test_vectors_go_by_name(pair: Pair, expo: Callable[..., Ran], tmp_path: Path) -> None:
    """`--vectors openchat` reads a shipped file; what is mistyped is told the names."""
    ran = expo("verify", tmp_path, "--vectors", "openchat", "--quick")
    assert ran.code == 3  # an empty folder, but nothing wrong with the name
    near = expo("verify", tmp_path, "--vectors", "opnchat")
    assert near.err == (
        "expo: opnchat is neither a file nor golden vectors of ours (did you mean openchat?)\n"
    )
    far = expo("verify", tmp_path, "--vectors", "xyz")
    assert "; those of ours: chatml, deepseek-v3, " in far.err
    assert near.code == far.code == 2


def test_a_key_of_golden_vectors_has_its_own_name(tmp_path: Path, expo: Callable[..., Ran]) -> None:
    file = tmp_path / "v.yml"
    file.write_text("shema: expo.golden/1\nname: x\nsource: y\ncases: []\n")
    ran = expo("verify", tmp_path, "--vectors", file)
    assert "schema: is required" in ran.err
    assert "shema: is not a known key (did you mean schema?)" in ran.err
    assert "schema_" not in ran.err


def test_what_a_cut_came_to_is_short_and_the_rest_on_request(
    pair: Pair, tmp_path: Path, expo: Callable[..., Ran]
) -> None:
    words = ("laser", pair.sft, tmp_path / "o", "--keep", "rank=2", "--target", "mlp")
    asked, got, _ = expo(*words).out.splitlines()
    assert asked == "asked  matrices cut to rank=2, bfloat16, rounded to nearest"
    assert got.startswith("got    2 of 2 matrices cut: ")
    assert len(got) < 100
    told = expo(*words, "-v", "--overwrite").out
    assert "cut 2 of 2 matrices: rank 2 of up to 10" in told
