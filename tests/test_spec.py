"""The YAML spec: strict, with positions; and α in its two conventions."""

import math
from pathlib import Path

import pytest

from expo.errors import SpecError
from expo.spec.read import read_spec
from expo.spec.request import both_conventions, resolve_alpha

GOOD = """\
merge_method: expo
base_model: org/sft
models:
  - model: org/aligned@v1
    parameters: {alpha: 1.5}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yml"
    path.write_text(text)
    return path


def test_the_smallest_spec(tmp_path: Path) -> None:
    request = read_spec(write(tmp_path, GOOD))
    assert request.alpha == 1.5
    assert str(request.base) == "org/sft"
    assert [str(o.reference) for o in request.operands] == ["org/aligned@v1"]
    assert (request.dtype, request.rounding, request.seed) == (None, "nearest", 0)


def test_every_key(tmp_path: Path) -> None:
    more = "out_dtype: float32\nrounding: stochastic\nseed: 7\n"
    text = GOOD.replace("alpha: 1.5", "paper_alpha: 5e-1") + more
    request = read_spec(write(tmp_path, text))
    assert (request.alpha, request.dtype, request.rounding, request.seed) == (
        1.5,
        "float32",
        "stochastic",
        7,
    )


def test_a_mapping_is_a_spec() -> None:
    request = read_spec(
        {
            "merge_method": "expo",
            "base_model": "org/sft",
            "models": [{"model": "org/aligned", "parameters": {"alpha": 2}}],
        }
    )
    assert request.alpha == 2.0


BAD = {
    "unknown key": (GOOD + "roundin: nearest\n", "6:1: roundin: is not a known key (did you mean rounding?)"),
    "unknown key inside": (GOOD.replace("{alpha", "{alhpa"), "5:18: models.0.parameters.alhpa: is not a parameter of expo (did you mean alpha?)"),
    "unknown method": (GOOD.replace("expo", "exppo"), "1:1: merge_method: 'exppo' is not a method of expo or mergekit (did you mean expo?)"),
    "missing key": (GOOD.replace("base_model: org/sft\n", ""), "1:1: base_model: is required by expo"),
    "duplicate key": (GOOD + "base_model: org/other\n", "6:1: base_model: the key is given twice"),
    "no models": ("merge_method: expo\nbase_model: org/sft\nmodels: []\n", "3:1: models: expo takes at least 1 model beside the base, not 0"),
    "neither alpha": (GOOD.replace("alpha: 1.5", ""), "5:5: models.0.parameters: needs alpha or paper_alpha"),
    "both alphas": (GOOD.replace("alpha: 1.5", "alpha: 1.5, paper_alpha: 0.5"), "give alpha or paper alpha, not both"),
    "nan": (GOOD.replace("1.5", ".nan"), "5:18: models.0.parameters.alpha: should be a finite number"),
    "text": (GOOD.replace("1.5", "lots"), "a number, a list of numbers over the layers, or filters with values, not 'lots'"),
    "alpha between": (GOOD.replace("1.5", "0.3"), "5:18: models.0.parameters.alpha: alpha 0.3 lies between"),
    "a path that is none": (GOOD.replace("org/sft", "./nowhere"), "2:1: base_model: base_model: ./nowhere is neither"),
    "no yaml": ("a: [", "not valid YAML"),
    "empty": ("", "1:1: the spec is empty"),
    "a list": ("- 1\n", "1:1: "),
    "custom tag": (GOOD.replace("org/sft", "!!python/object:os.system x"), "2:13: 'x' cannot be read"),
    "dtype": (GOOD + "out_dtype: bfloat15\n", "6:1: out_dtype: 'bfloat15' is not one of bfloat16, float16, float32, float64 (did you mean"),
}  # fmt: skip


def test_unknown_keys_and_wrong_parameters_are_named_together(tmp_path: Path) -> None:
    text = """\
merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {density: 0.5, wieght: 0.5}
    parametres: {}
  - model: no such model
    parameters: {weight: lots, gamma: 0.1}
transform: []
"""
    with pytest.raises(SpecError) as caught:
        read_spec(write(tmp_path, text))
    found = str(caught.value)
    for message in (
        "6:5: models.0.parametres: is not a known key (did you mean parameters?)",
        "9:1: transform: is not a known key (did you mean transforms?)",
        "5:32: models.0.parameters.wieght: is not a parameter of ties (did you mean weight?)",
        "7:5: models.1.model: model: no such model is neither",
        "8:18: models.1.parameters.weight: a number, a list of numbers over the layers",
    ):
        assert message in found, found
    assert len(found.splitlines()) == 7
    lines = [int(line.split(":")[1]) for line in found.splitlines()]
    assert lines == sorted(lines)


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, case: tuple[str, str]) -> None:
    text, message = case
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        read_spec(path)
    assert str(caught.value).startswith(f"{path}:")
    assert message in str(caught.value)


def test_every_fault_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "roundin: nearest\nsed: 1\n")
    with pytest.raises(SpecError) as caught:
        read_spec(path)
    assert len(str(caught.value).splitlines()) == 2


def test_yaml_scalars_mean_what_they_look_like(tmp_path: Path) -> None:
    assert read_spec(write(tmp_path, GOOD.replace("1.5", "1e1"))).alpha == 10.0
    with pytest.raises(SpecError, match="'no'"):  # a string, not False
        read_spec(write(tmp_path, GOOD + "interpolate: no\n"))


def test_a_missing_file_is_a_spec_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec(tmp_path / "none.yml")


def test_paper_alpha_is_one_less() -> None:
    assert resolve_alpha(None, 0.3) == 1.3
    assert resolve_alpha(None, 0.0) == 1.0
    assert both_conventions(1.3) == "alpha 1.3 (paper alpha 0.3)"
    assert resolve_alpha(-1.0, None) == -1.0
    assert resolve_alpha(0.3, None, interpolate=True) == 0.3


@pytest.mark.parametrize("alpha", [1e-9, 0.3, 0.999])
def test_alpha_between_0_and_1_shows_both_readings(alpha: float) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_alpha(alpha, None)
    assert f"--paper-alpha {alpha:g}" in str(caught.value)
    assert "--interpolate" in str(caught.value)
    with pytest.raises(SpecError, match="--interpolate"):
        resolve_alpha(None, alpha - 1.0)


@pytest.mark.parametrize("alpha", [math.inf, math.nan, -math.inf])
def test_alpha_must_be_finite(alpha: float) -> None:
    with pytest.raises(SpecError, match="finite"):
        resolve_alpha(alpha, None)
