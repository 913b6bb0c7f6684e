"""How the demo's pair was trained: `python -m expo.demo.train FOLDER` (about 20 s on one thread).

200 steps of supervised training, then 20 steps of DPO (arXiv 2305.18290) with an NLL term: an
under-trained alignment, the case that ExPO is for.
"""

import copy
import random
import string
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from expo.demo.toy import JUDGEMENTS, answer, encode, log_probability, words

SEED = 0
SFT_STEPS, SFT_RATE = 200, 3e-3
DPO_STEPS, DPO_RATE, DPO_BETA, NLL_WEIGHT = 20, 3e-5, 0.5, 0.5
BATCH = 64

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'u:' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'a:' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the toy knows the roles user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: 34 in all."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {
        c: i for i, c in enumerate([*special, *string.ascii_lowercase, ":", " ", "\n", "?"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MistralForCausalLM(config)


def train_sft(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_RATE)
    generator = random.Random(SEED)
    for step in range(SFT_STEPS):
        judgements = generator.choices(list(JUDGEMENTS), list(JUDGEMENTS.values()), k=BATCH)
        batch = zip(words(BATCH, 1000 + step), judgements, strict=True)
        pairs = [encode(tokenizer, word, answer(j, word)) for word, j in batch]
        _step(optimizer, -log_probability(model, pairs).mean() / len(pairs[0][1]))


def train_dpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=DPO_RATE)
    generator = random.Random(SEED + 1)
    for step in range(DPO_STEPS):
        batch = words(BATCH, 100_000 + step)
        rejected = generator.choices(["no", "um"], k=BATCH)
        good = [encode(tokenizer, word, answer("ok", word)) for word in batch]
        bad = [encode(tokenizer, w, answer(j, w)) for w, j in zip(batch, rejected, strict=True)]
        with torch.no_grad():
            anchor = log_probability(reference, good) - log_probability(reference, bad)
        chosen = log_probability(model, good)
        margin = chosen - log_probability(model, bad) - anchor
        nll = -chosen.mean() / len(good[0][1])
        _step(optimizer, -logsigmoid(DPO_BETA * margin).mean() + NLL_WEIGHT * nll)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    copy.deepcopy(model).to(dtype=dtype).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)


def main(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Train both models and save them below `folder`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train_sft(model, tokenizer)
    save(model, tokenizer, folder / "sft", dtype)
    train_dpo(model, tokenizer)
    save(model, tokenizer, folder / "aligned", dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
