"""Generation: the same answers in any batch, draws that follow the model's probabilities."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expo.demo.toy import MODELS, load, words
from expo.errors import CheckpointError, SpecError
from expo.sampling.decoding import Decoding, decoding
from expo.sampling.generate import Sample, encode, generate
from expo.sampling.measures import log_likelihoods, repetition
from expo.sampling.noise import gumbel, origin
from expo.sampling.prompts import Prompt, read_prompts

SAMPLED = Decoding(temperature=1.0, max_new_tokens=20)
GREEDY = Decoding(max_new_tokens=20)


@pytest.fixture(scope="module")
def toy():
    return load(MODELS / "aligned")


def prompt(text: str, name: str | None = None) -> Prompt:
    return Prompt(name or text, ({"role": "user", "content": text},))


WORDS = [prompt(word[: 2 + n % 6]) for n, word in enumerate(words(6, 5))]
"""Of many lengths, so that batches are padded."""


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, replace(SAMPLED, top_k=3, top_p=0.9, min_p=0.02)])
def test_no_answer_depends_on_its_batch(toy, how: Decoding) -> None:
    alone = [generate(*toy, [one], decoding=how, seed=3)[0] for one in WORDS]
    assert generate(*toy, WORDS, decoding=how, seed=3, batch_size=4) == alone
    assert generate(*toy, WORDS[::-1], decoding=how, seed=3) == alone[::-1]


def test_greedy_is_what_transformers_generates(toy) -> None:
    model, tokenizer = toy
    made = generate(model, tokenizer, WORDS, decoding=GREEDY)
    for one, sample in zip(WORDS, made, strict=True):
        ids = torch.tensor([encode(tokenizer, one)])
        wanted = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=20)
        assert sample.tokens == tuple(wanted[0, ids.shape[1] :].tolist())


def test_draws_follow_the_probabilities(toy) -> None:
    model, tokenizer = toy
    count = 1500
    many = [prompt("hello", f"{n}") for n in range(count)]
    made = generate(
        model, tokenizer, many, decoding=replace(SAMPLED, max_new_tokens=1), batch_size=400
    )
    ids = torch.tensor([encode(tokenizer, many[0])])
    exact = model(ids).logits[0, -1].softmax(-1)
    got = Counter(sample.tokens[0] for sample in made)
    for token, p in enumerate(exact.tolist()):
        assert abs(got[token] / count - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1 / count


def test_noise_is_a_function_of_seed_prompt_position_and_token() -> None:
    cpu = torch.device("cpu")
    starts = [origin(0, "a"), origin(0, "b"), origin(1, "a")]
    together = gumbel(starts, 2, 500, cpu)
    assert all(
        torch.equal(gumbel([s], 2, 500, cpu)[0], row)
        for s, row in zip(starts, together, strict=True)
    )
    assert torch.equal(gumbel(starts, 2, 30, cpu), together[:, :30])
    others = torch.stack([*together, *gumbel(starts, 3, 500, cpu)])
    assert (torch.corrcoef(others) - torch.eye(6)).abs().max() < 0.2
    much = gumbel([origin(0, "c")], 0, 200_000, cpu).double()
    assert float(much.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(much.var()) == pytest.approx(torch.pi**2 / 6, abs=0.03)


def test_an_answer_that_does_not_end_says_so(toy) -> None:
    (cut,) = generate(*toy, WORDS[:1], decoding=replace(GREEDY, max_new_tokens=3))
    assert (cut.length, cut.finish_reason) == (3, "length")
    (whole,) = generate(*toy, WORDS[:1], decoding=GREEDY)
    assert whole.finish_reason == "stop"
    assert whole.tokens[-1] == toy[1].eos_token_id
    assert whole.tokens[:3] == cut.tokens
    assert "</s>" not in whole.text


def test_every_answer_has_its_own_context(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = toy
    monkeypatch.setattr(model.generation_config, "eos_token_id", 33)  # which it never says
    context = model.config.max_position_embeddings
    long = prompt("a" * (context - 8))  # the template takes six tokens
    alone = generate(model, tokenizer, [long], decoding=GREEDY)
    assert (alone[0].length, alone[0].finish_reason) == (2, "length")
    assert generate(model, tokenizer, [*WORDS, long], decoding=GREEDY)[-1:] == alone
    with pytest.raises(
        CheckpointError, match=f"has {context + 3} tokens, the model's context {context}"
    ):
        generate(model, tokenizer, [prompt("a" * (context - 3))], decoding=GREEDY)


def test_penalties_are_subtracted_from_what_was_said(toy) -> None:
    model, tokenizer = toy
    how = replace(GREEDY, frequency_penalty=2.0, presence_penalty=0.5)
    for one, sample in zip(WORDS, generate(model, tokenizer, WORDS, decoding=how), strict=True):
        ids = encode(tokenizer, one)
        said: Counter[int] = Counter()
        for token in sample.tokens:
            logits = model(torch.tensor([ids])).logits[0, -1].tolist()
            scores = [x - 2.0 * said[t] - 0.5 * (said[t] > 0) for t, x in enumerate(logits)]
            assert scores[token] == pytest.approx(max(scores), abs=1e-4)
            ids, said[token] = [*ids, token], said[token] + 1


@torch.no_grad()
def test_likelihood_of_answers(toy) -> None:
    model, tokenizer = toy
    samples = generate(model, tokenizer, WORDS, decoding=SAMPLED)
    found = log_likelihoods(model, tokenizer, WORDS, samples, batch_size=4)
    for one, sample, value in zip(WORDS, samples, found, strict=True):
        ids = encode(tokenizer, one)
        scores = model(torch.tensor([[*ids, *sample.tokens]])).logits[0].double().log_softmax(-1)
        wanted = [scores[len(ids) - 1 + n, token] for n, token in enumerate(sample.tokens)]
        assert value == pytest.approx(float(sum(wanted)) / len(wanted), abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "share"), [((), 0.0), (range(9), 0.0), ([1] * 13, 0.9), ([1, 2, 3, 4] * 2, 0.2)]
)
def test_repetition(tokens, share: float) -> None:
    assert repetition(tuple(tokens)) == pytest.approx(share)


def test_a_model_without_a_template(toy) -> None:
    import copy

    tokenizer = copy.deepcopy(toy[1])
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match=r"no chat template: put a chat_template\.jinja"):
        generate(toy[0], tokenizer, WORDS, decoding=GREEDY)


def test_settings_of_the_model_of_a_preset_and_given(toy) -> None:
    from transformers import GenerationConfig

    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=100)
    assert decoding(own) == Decoding(0.6, 50, 0.9, 0.0, max_new_tokens=100)
    assert decoding(GenerationConfig(temperature=0.6)) == Decoding()
    assert decoding(own, temperature=0.0, top_k=None).temperature == 0
    paper = decoding(own, "expo-paper", max_new_tokens=7)
    assert paper == Decoding(0.7, 50, 0.9, 0.0, 0.1, 0.1, 7)
    with pytest.raises(SpecError, match="preset paper is not one of expo-paper"):
        decoding(own, "paper")
    with pytest.raises(SpecError, match=r"top_p 1\.5 is out of range: above 0, at most 1"):
        decoding(own, top_p=1.5)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [{"prompt": "x"}, {"messages": chat, "id": "own"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_prompts(file)
    assert (first.id, first.messages[0]["content"]) == ("0", "x")
    assert (second.id, len(second.messages)) == ("own", 1)
    file.write_text("{}")
    with pytest.raises(SpecError, match=":1: no prompt"):
        read_prompts(file)


def test_a_sample_knows_its_length() -> None:
    assert Sample("ok", (4, 5, 2), "stop").length == 3
