"""expo: ExPO checkpoints, θ = θ_sft + α(θ_aligned − θ_sft), at the speed of the disk.

This module is the only public door. Its names load what they need when they are first used, so
`import expo` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expo.api import (
        apply,
        diff,
        extract_lora,
        extrapolate,
        merge,
        plan,
        spectrum,
        verify,
    )
    from expo.errors import (
        CheckpointError,
        ExpoError,
        HubError,
        OutputError,
        SpecError,
        TokenizerError,
    )
    from expo.planning.report import PlanReport
    from expo.verbs.diff import DiffResult
    from expo.verbs.extract_lora import ExtractResult
    from expo.verbs.merge import MergeResult
    from expo.verbs.spectrum import MatrixSpectrum
    from expo.verification.check import VerifyResult

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DiffResult",
    "ExpoError",
    "ExtractResult",
    "HubError",
    "MatrixSpectrum",
    "MergeResult",
    "OutputError",
    "PlanReport",
    "SpecError",
    "TokenizerError",
    "VerifyResult",
    "apply",
    "diff",
    "extract_lora",
    "extrapolate",
    "merge",
    "plan",
    "spectrum",
    "verify",
]

_HOMES = {
    "DiffResult": "expo.verbs.diff",
    "ExtractResult": "expo.verbs.extract_lora",
    "MatrixSpectrum": "expo.verbs.spectrum",
    "MergeResult": "expo.verbs.merge",
    "PlanReport": "expo.planning.report",
    "VerifyResult": "expo.verification.check",
    "apply": "expo.api",
    "diff": "expo.api",
    "extract_lora": "expo.api",
    "extrapolate": "expo.api",
    "merge": "expo.api",
    "plan": "expo.api",
    "spectrum": "expo.api",
    "verify": "expo.api",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'expo' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "expo.errors")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
