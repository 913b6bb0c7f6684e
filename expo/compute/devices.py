"""Devices by their names. Imports torch only when one is tried."""

import re
import warnings
from typing import TYPE_CHECKING

from expo.errors import ExpoError, SpecError

if TYPE_CHECKING:
    import torch

PROCESSOR = "cpu"
_NAME = re.compile(r"cpu|cuda(:\d{1,3})?")


def device_name(text: str) -> str:
    """The text, if it is `cpu`, `cuda` or `cuda:1`.

    Raises:
        SpecError: it is none of them.
    """
    if not _NAME.fullmatch(str(text)):
        raise SpecError(f"device {text!r} is none of cpu, cuda, cuda:N")
    return text


def usable(name: str) -> "torch.device":
    """torch's device of a name, with its number; something was computed on it.

    Raises:
        ExpoError: it is not there, or torch cannot use it.
    """
    import torch

    with warnings.catch_warnings():  # of a driver that is too old: the error says so, too
        warnings.simplefilter("ignore")
        try:
            tried = torch.ones(1, device=name).add_(1.0)
            tried.item()
        except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
            said = f"device {name} cannot be used: {_reason(name, error)}"
            raise ExpoError(f"{said}, or take --device cpu") from error
    return tried.device


def for_models(given: str | None) -> "torch.device":
    """Where a model runs: the device asked for, or CUDA where there is one. It is tried before anything is loaded.

    Raises:
        SpecError: it is no name of a device.
        ExpoError: as `usable`.
    """
    import torch

    if given is None:
        return usable("cuda" if torch.cuda.is_available() else PROCESSOR)
    try:
        torch.device(given)
    except RuntimeError:
        raise SpecError(f"device {given!r} is none of cpu, cuda, cuda:N, mps") from None
    return usable(given)


def _reason(name: str, error: Exception) -> str:
    """What is wrong, and one cure."""
    import torch

    if name.startswith("cuda") and torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install one that is built with it"
    count, number = torch.cuda.device_count(), name.partition(":")[2]
    if name.startswith("cuda") and number.isdecimal() and 0 < count <= int(number):
        there = ", ".join(f"cuda:{place}" for place in range(count))
        return f"there is no such one beside {there}: take one of them"
    said = str(error).strip().partition("\n")[0][:200]
    return f"{said.rstrip('.')}: name another one"
