"""What the name of a tensor says about it."""

import re

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
INPUTS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embeddings.weight",
          "embed_in.weight")  # fmt: skip

DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that a model computes for itself; some files hold them, some do not."""

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|wte|word_embeddings|embed_in|shared"
    r"|lm_head|embed_out|output)\.(weight|bias)$"
)


def is_embedding(name: str) -> bool:
    """Whether the rows of a tensor belong to tokens: input embeddings and heads."""
    return bool(_EMBEDDING.search(name))


_KINDS = {
    "embeddings": re.compile(r"(^|\.)(embed_tokens|tok_embeddings|wte|word_embeddings|embed_in|shared)\."),
    "head": re.compile(r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$"),
    "norms": re.compile(r"norm|(^|\.)ln_"),
    "biases": re.compile(r"\.bias$"),
}  # fmt: skip
KINDS = tuple(_KINDS)
"""Kinds of tensors that a merge can leave out."""


def is_of_kind(name: str, kinds: tuple[str, ...]) -> bool:
    return any(_KINDS[kind].search(name) for kind in kinds)
