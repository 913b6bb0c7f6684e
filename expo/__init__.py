"""expo: ExPO checkpoints, θ = θ_sft + α(θ_aligned − θ_sft), at the speed of the disk.

This module is the only public door. Its names load what they need when they are first used, so
`import expo` is cheap.
"""

from importlib import import_module

# Not imported: until the program minds signals, every import is one that they can break.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from expo.errors import (
        CheckpointError,
        EndpointError,
        ExpoError,
        HubError,
        OutputError,
        SpecError,
        TokenizerError,
        VerificationError,
    )
    from expo.results import (
        DiffResult,
        ExtractResult,
        MatrixSpectrum,
        MergeResult,
        PlanReport,
        VerifyResult,
    )
    from expo.verbs.apply import apply
    from expo.verbs.card import card
    from expo.verbs.compare import compare
    from expo.verbs.diff import diff
    from expo.verbs.evaluate import evaluate
    from expo.verbs.extract_lora import extract_lora
    from expo.verbs.info import info
    from expo.verbs.merge import extrapolate, merge
    from expo.verbs.plan import plan
    from expo.verbs.publish import publish
    from expo.verbs.push import push
    from expo.verbs.scale_adapter import extrapolate_adapter
    from expo.verbs.spectrum import spectrum
    from expo.verbs.sweep import sweep
    from expo.verbs.verify import verify

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DiffResult",
    "EndpointError",
    "ExpoError",
    "ExtractResult",
    "HubError",
    "MatrixSpectrum",
    "MergeResult",
    "OutputError",
    "PlanReport",
    "SpecError",
    "TokenizerError",
    "VerificationError",
    "VerifyResult",
    "apply",
    "card",
    "compare",
    "diff",
    "evaluate",
    "extract_lora",
    "extrapolate",
    "extrapolate_adapter",
    "info",
    "merge",
    "plan",
    "publish",
    "push",
    "spectrum",
    "sweep",
    "verify",
]

_VERBS = {name: f"expo.verbs.{name}" for name in __all__ if name.islower()} | {
    "extrapolate": "expo.verbs.merge",
    "extrapolate_adapter": "expo.verbs.scale_adapter",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'expo' has no attribute {name!r}")
    error = "expo.errors" if name.endswith("Error") else "expo.results"
    return getattr(import_module(_VERBS.get(name, error)), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
