"""The forms in which mergekit's users write a model, a number and a dtype, turned into one each."""

from collections.abc import Iterator

from expo.spec.request import dtype_name

_MODEL_KEYS = ("model", "base_model", "source_model")
_REFERENCE = {"model", "lora", "override_architecture"}
_LOCATION = {"path", "revision"}


def model_text(value: object) -> object:
    """`{model: {path: …, revision: …}, lora: {path: …}}` as `path@revision+lora`; text as it is."""
    if not isinstance(value, dict):
        return value
    if "path" in value and value.keys() <= _LOCATION:
        revision = value.get("revision")
        return f"{value['path']}@{revision}" if revision else value["path"]
    if "model" in value and value.keys() <= _REFERENCE:
        model, lora = model_text(value["model"]), model_text(value.get("lora"))
        return f"{model}+{lora}" if lora else model
    return value


def whole(value: object) -> object:
    """A whole number that is written as text or with a point; anything else as it is."""
    try:
        number = float(value) if isinstance(value, str | float) else None
    except ValueError:
        return value
    return int(number) if number is not None and number.is_integer() else value


def dtype(value: object) -> object:
    return dtype_name(value) if isinstance(value, str) else value


def plain(value: object, key: str | int = "") -> object:
    """A spec with every model as text, or as mergekit's mapping of texts where it has more to say."""
    if isinstance(value, dict) and key in _MODEL_KEYS:
        if not value.get("override_architecture"):
            return model_text(value)
        return {name: model_text(item) for name, item in value.items()}
    if isinstance(value, dict):
        return {name: plain(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def overrides_architecture(value: object) -> bool:
    return any(
        key == "override_architecture" or overrides_architecture(item)
        for key, item in _items(value)
    )


def _items(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
