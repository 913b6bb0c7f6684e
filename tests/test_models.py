"""The result in transformers: loads clean, and computes what the naively merged model computes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import expo as door
from expo.demo.toy import MODELS

from .test_formats import tiny_model


def naive_model(sft: Path, aligned: Path, alpha: float) -> torch.nn.Module:
    """Both models whole in memory, merged in float64, rounded to the aligned model's dtype."""
    base = AutoModelForCausalLM.from_pretrained(sft, dtype="auto")
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype="auto")
    state = base.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = state[name].double()
            parameter.copy_(start + alpha * (parameter.double() - start))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("alpha", "tied"),
    [(1.5, True), *(pytest.param(a, tied, marks=pytest.mark.slow) for a in (0.0, 1.0, 1.5) for tied in (False, True) if (a, tied) != (1.5, True))],
)  # fmt: skip
def test_logits_equal_the_naive_model(tmp_path: Path, tied: bool, alpha: float) -> None:
    for seed, name in ((0, "sft"), (1, "aligned")):
        model = tiny_model(seed)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    sft, aligned, out = tmp_path / "sft", tmp_path / "aligned", tmp_path / "out"
    door.extrapolate(sft, aligned, out, alpha=alpha, verify=False)
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(30).view(2, 15)
    expected = naive_model(sft, aligned, alpha)
    with torch.no_grad():
        difference = (merged(ids).logits - expected(ids).logits).abs().max()
    assert float(difference) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_demo_pair_keeps_its_tokenizer_and_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    door.extrapolate(MODELS / "sft", MODELS / "aligned", tmp_path / "out", alpha=1.5)
    before = AutoTokenizer.from_pretrained(MODELS / "aligned")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hello"}]
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(
        messages, tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
