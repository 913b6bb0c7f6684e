"""Where in the network a tensor sits: its layer, and its module with the layer taken out."""

import re

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_SUFFIX = re.compile(r"\.weight$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def module_of(name: str) -> tuple[int | None, str]:
    """(layer, module): `model.layers.3.mlp.up_proj.weight` → (3, `mlp.up_proj`).

    Numbers below the layer (experts) become `*`; what is outside the layers has layer None.
    """
    found = _LAYER.search(name)
    layer = int(found[1]) if found else None
    rest = name[found.end() :] if found else name.removeprefix("model.")
    return layer, _NUMBER.sub("*", _SUFFIX.sub("", rest))
