"""Models that a checkpoint does not make: one line for `evaluate`, `sweep` and reward models, never made-up weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from expo.demo.toy import MODELS
from expo.errors import CheckpointError
from expo.evaluation.local import open_local
from expo.planning.build import build_plan
from expo.sampling.live import build
from expo.sampling.prompts import Prompt
from expo.sampling.rewards import open_reward
from expo.spec.request import make_request


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def misfit(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))


def evaluated(folder: Path) -> None:
    open_local(str(folder), preset=None, num_beams=1, batch_size=1, device="cpu").check([])


def rewarding(folder: Path) -> None:
    open_reward(str(folder))


def swept(folder: Path) -> None:
    plan = build_plan(make_request(str(folder), str(folder)).at(1.0))
    build(plan)


@pytest.mark.parametrize(
    ("harm", "use", "message"),
    [
        (lacking, evaluated, r"lacks model\.norm\.weight that the model has: run expo verify"),
        (lacking, rewarding, r"is no reward model: it has no model\.norm\.weight"),
        (cut, evaluated, "does not load through transformers: .*file not fully covered"),
        (cut, rewarding, "reward .* does not load: .*file not fully covered"),
        (misfit, evaluated, r"mlp\.down_proj\.weight and \d+ more: another shape"),
        (misfit, rewarding, ": another shape in the checkpoint than its config.json says"),
        (misfit, swept, ": another shape in the checkpoint than its config.json says"),
    ],
)
def test_a_damaged_model_is_one_line(
    harm: Callable[[Path], None], use: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(MODELS / "aligned", folder)
    if use is rewarding:
        _as_reward(folder)
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        use(folder)
    assert "\n" not in str(raised.value)


def _as_reward(folder: Path) -> None:
    """A sequence classifier of the same weights, with a head."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("lm_head.weight")
    save_file({**tensors, "score.weight": head[:1].clone()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(MODELS / "aligned", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}{% endfor %}"
    )
    messages = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
    source = open_local(str(folder), preset=None, num_beams=1, batch_size=1, device="cpu")
    with pytest.raises(CheckpointError, match="the chat template refuses prompt 7: no system"):
        source.check([Prompt("7", messages)])
