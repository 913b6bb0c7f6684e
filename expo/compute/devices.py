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
    if not _NAME.fullmatch(text):
        raise SpecError(f"device {text!r} is none of cpu, cuda, cuda:N")
    return text


def usable(name: str) -> "torch.device":
    """torch's device of a name, with its number; something was computed on it.

    Raises:
        ExpoError: it is not there, or torch cannot use it.
    """
    import torch

    try:
        with warnings.catch_warnings():  # of a driver that is too old: the reason follows
            warnings.simplefilter("ignore")
            tried = torch.ones(1, device=name).add_(1.0)
            tried.item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        reason = _reason(name) or str(error).strip().partition("\n")[0][:200]
        raise ExpoError(f"device {name} cannot be used: {reason}") from error
    return tried.device


def for_models(given: str | None) -> "torch.device":
    """Where a model runs: the device asked for, or CUDA where there is one. It is tried before anything is loaded.

    Raises:
        ExpoError: as `usable`.
    """
    import torch

    return usable(given or ("cuda" if torch.cuda.is_available() else PROCESSOR))


def _reason(name: str) -> str:
    """Why CUDA is not there, and the cure; nothing where torch's own words have to do."""
    import torch

    if not name.startswith("cuda"):
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: take --device cpu, or install torch with CUDA"
    count = torch.cuda.device_count()
    if not count:
        return "no CUDA device is there (nvidia-smi shows what the driver sees): take --device cpu"
    there = ", ".join(f"cuda:{number}" for number in range(count))
    is_known = int(name.partition(":")[2] or 0) < count
    return "" if is_known else f"there is no more than {there}: take one of them, or --device cpu"
