"""What answers are worth: a sequence classifier as reward model, or any function of the user's."""

import importlib
import re
import sys
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from expo.checkpoint.reference import Location, parse_loadable
from expo.errors import CheckpointError, ExpoError, SpecError
from expo.sampling.prompts import Message
from expo.sampling.sources import sources
from expo.sampling.talk import to_stderr

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = Sequence[Message]
Reward = Callable[[Sequence[Conversation], Sequence[str]], Sequence[float]]
"""Called with conversations and an answer to each; gives a number each, the higher the better."""

_SHOWN = 200
_LARGEST = 3.4e38
"""Float32's: beyond it sums of squares, which every interval takes, come to their end."""

_THEIRS = (Exception, SystemExit, CancelledError)
"""A user's code may raise anything; what ends the program is not among them."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_reward(
    name: str,
    *,
    device: "str | torch.device" = "cpu",
    batch_size: int = 16,
    say: Callable[[str], None] = lambda _: None,
) -> Reward:
    """The reward that the user named: a model (directory or Hub id), or `module:function`.

    Args:
        say: is told what the reward model does not read.

    Raises:
        SpecError: there is no such model, module or function.
        CheckpointError: the model is no reward model.
    """
    if is_function(name):
        return _checked(_function(name), name)
    return _checked(_Classifier(name, device, batch_size, say), name)


def is_function(name: str) -> bool:
    return _FUNCTION.fullmatch(name) is not None and not Path(name).exists()


def identity(name: str) -> str:
    """What tells a reward from a changed one: of a function its module's source and that of the modules of
    the same folder which it imports, of a folder its files."""
    if is_function(name):
        modules = {name.partition(":")[0], _function(name).__module__}
        files = {m: getattr(sys.modules.get(m), "__file__", None) for m in modules}
        found = {path for m, file in files.items() if file for path in sources(Path(file), m)}
        return " ".join([name, *sorted(map(_stamp, found))])
    place = parse_loadable(name, role="reward")
    if place.path is None:
        return str(place)
    files = sorted(file for file in place.path.iterdir() if file.is_file())
    return f"{place.path.name} {[_stamp(file) for file in files]}"


def label(name: str) -> str:
    """The reward's name without the folders of this machine."""
    place = None if is_function(name) else parse_loadable(name, role="reward").path
    return name if place is None else place.resolve().name


def _stamp(file: Path) -> str:
    known = file.stat()
    return f"{file.name} {known.st_size} {known.st_mtime_ns}"


def _function(name: str) -> Reward:
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    try:
        with to_stderr():
            found = getattr(importlib.import_module(module), attribute, None)
    except _THEIRS as error:
        if isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name)):
            raise SpecError(f"reward {name}: {error}: run where {module}.py lies") from error
        raise SpecError(f"reward {name}: {module} cannot be imported: {_told(error)}") from error
    if not callable(found):
        raise SpecError(f"reward {name}: {module} has no function {attribute}")
    return found  # pyright: ignore[reportReturnType]


def _checked(reward: Reward, name: str) -> Reward:
    """The reward, whose numbers are counted and finite."""

    def checked(conversations: Sequence[Conversation], answers: Sequence[str]) -> list[float]:
        own: list[list[Message]] = [[*map(dict, one)] for one in conversations]  # theirs to change
        values = _called(reward, own, list(answers), name)
        if len(values) != len(answers):
            raise SpecError(f"reward {name} gave {len(values)} numbers for {len(answers)} answers")
        for value, answer in zip(values, answers, strict=True):
            if not abs(value) <= _LARGEST:  # nor NaN
                raise SpecError(
                    f"reward {name} gave {value:g} for the answer {answer[:60]!r}: give numbers up to {_LARGEST:g}"
                )
        return values

    return checked


def _called(
    reward: Reward, conversations: list[list[Message]], answers: list[str], name: str
) -> list[float]:
    """What the user's function gives, drawn from it here if it gives it bit by bit."""
    try:
        with to_stderr():
            values = reward(conversations, answers)
            return _numbers([*values] if isinstance(values, Iterator) else values, name)
    except ExpoError:
        raise
    except _THEIRS as error:
        raise SpecError(f"reward {name} failed: {_told(error)}; --debug shows where") from error


def _numbers(values: object, name: str) -> list[float]:
    """A number each, from lists, arrays and tensors of shape (n,) or (n, 1); no names or letters, and nothing
    that has no order."""
    try:
        if isinstance(values, str | bytes | Mapping | Set):
            raise TypeError(type(values))
        return [_number(v.item() if hasattr(v, "item") else v) for v in values]  # pyright: ignore
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SpecError(
            f"reward {name} gave {_cut(repr(values))}: give a number for each answer, as a list"
        ) from error


def _number(value: object) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(type(value))
    return float(value)  # pyright: ignore[reportArgumentType]


def _told(error: BaseException) -> str:
    """An error of the user's code, in one line."""
    return _cut(f"{type(error).__name__}: {error}".rstrip(": "))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


class _Classifier:
    """A sequence classifier with one output, through its own tokenizer and chat template.

    Padding is on the right and with a token that no conversation of the batch holds: classifiers read the
    rightmost token that is not their padding, which drops the last one where padding is the end of a turn.
    """

    def __init__(
        self, name: str, device: "str | torch.device", batch_size: int, say: Callable[[str], None]
    ) -> None:
        self._name, self._batch_size, self._say = name, batch_size, say
        self._has_said = False
        place = parse_loadable(name, role="reward")
        self._model, self._tokenizer = _load(place, name)
        self._model.to(device)  # pyright: ignore[reportArgumentType]
        self._longest = _longest(self._model, self._tokenizer)

    def __call__(
        self, conversations: Sequence[Conversation], answers: Sequence[str]
    ) -> list[float]:
        rows = [self._encode(*one) for one in zip(conversations, answers, strict=True)]
        cut = sum(len(row) > self._longest for row in rows)
        if cut and not self._has_said:
            self._has_said = True
            self._say(
                f"warning: {self._name} reads {self._longest} tokens: {cut} of {len(rows)} conversations "
                "are longer, their ends do not count; nor do those of later ones, which are not counted here"
            )
        values: list[float] = []
        for begin in range(0, len(rows), self._batch_size):
            batch = rows[begin : begin + self._batch_size]
            values += self._scores([row[: self._longest] for row in batch])
        return values

    def _encode(self, conversation: Conversation, answer: str) -> list[int]:
        whole = [*map(dict, conversation), {"role": "assistant", "content": answer}]
        try:
            ids = self._tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        except Exception as error:  # a template may raise anything
            raise CheckpointError(
                f"{self._name}: its chat template refuses a conversation: {error}"
            ) from error
        return list(ids)  # pyright: ignore

    def _scores(self, rows: list[list[int]]) -> list[float]:
        import torch

        config = self._model.config.get_text_config()
        config.pad_token_id = pad = _unused(rows, config.pad_token_id)
        longest = max(map(len, rows))
        device = self._model.device
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        with torch.inference_mode():
            logits = self._model(ids, attention_mask=torch.tensor(mask, device=device)).logits
        return logits[:, 0].float().tolist()


def _unused(rows: Sequence[Sequence[int]], pad: int | None) -> int:
    """The padding token, or the first other that no row holds."""
    used = {token for row in rows for token in row}
    if pad is not None and pad >= 0 and pad not in used:
        return pad
    return next(token for token in range(len(used) + 1) if token not in used)


def _load(place: Location, name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from expo.sampling.loading import one_line, read_model

    where = str(place.path or place.repo_id)
    known = {"revision": place.revision, "trust_remote_code": False}
    with one_line(f"reward {name} does not load", cure=f"; {_CURE}"):
        tokenizer = AutoTokenizer.from_pretrained(where, **known)
        model, missing = read_model(AutoModelForSequenceClassification, where, **known)
    if missing:
        raise CheckpointError(f"{name} is no reward model: it has no {missing[0]}; {_CURE}")
    if model.config.num_labels != 1:
        raise CheckpointError(
            f"{name} gives {model.config.num_labels} numbers, a reward is one; {_CURE}"
        )
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{name} has no chat template; {_CURE}")
    return model.eval(), tokenizer


_CURE = "name one, or module:function for a function of your own"


def _longest(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(context or sys.maxsize, tokenizer.model_max_length)
