"""Whether the sides of an extrapolation belong together: two models, of one kind, adapters on their bases."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import numpy as np

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo, printable
from expo.checkpoint.reader import Reader
from expo.checkpoint.reference import Reference
from expo.planning.findings import Findings
from expo.planning.jobs import Blend, TensorJob
from expo.spec.request import Request

_LOOKED_AT_BYTES = 4096  # of every tensor; the first that differs ends it

Opened = Mapping[Reference, Checkpoint]


def check_sides(
    request: Request, opened: Opened, jobs: Mapping[str, TensorJob], found: Findings
) -> bool:
    """Refuse an extrapolation of models that have no tensor in common; warn of two that are the same, and of
    adapters that were made for another base.

    Returns:
        Whether the models have anything in common, so that it is worth listing what differs.
    """
    found.warnings += (text for model in opened.values() for text in _other_base(model))
    if request.method != "expo" or request.base is None or request.foreign is not None:
        return True
    sft = opened[request.base]
    tops = [opened[operand.reference] for operand in request.operands]
    if not any(sft.weights.keys() & top.weights.keys() for top in tops):
        labels = " and ".join(model.label for model in (sft, *tops))
        found.refusals.append(
            f"no tensor is in both models ({labels}): there is nothing to extrapolate; is this the SFT "
            "model that the aligned one was trained from?"
        )
        return False
    if jobs and not any(isinstance(job.rule, Blend) for job in jobs.values()):
        found.warnings.append(
            "no tensor is extrapolated: all are left out, fixed or on one side only, and copied"
        )
    found.warnings += (same_weights(sft, top) for top in tops if _look_alike(sft, top))
    return True


def same_weights(sft: Checkpoint, aligned: Checkpoint) -> str:
    labels = "" if sft.label == aligned.label else f" and {aligned.label}"
    return f"SFT and aligned hold the same weights ({sft.label}{labels}): alpha changes nothing"


def _look_alike(sft: Checkpoint, aligned: Checkpoint) -> bool:
    """Whether two models are one, or every tensor of one begins as the other's. Bytes that are all 0 tell
    nothing."""
    if sft is aligned:
        return True
    if sft.adapter or aligned.adapter or sft.weights.keys() != aligned.weights.keys():
        return False
    tells = False
    with _Heads() as heads:
        for name, weight in sft.weights.items():
            mine, theirs = [*weight.parts], [*aligned.weights[name].parts]
            if [(i.dtype, i.shape) for _, i in mine] != [(i.dtype, i.shape) for _, i in theirs]:
                return False
            for one, other in zip(mine, theirs, strict=True):
                head = heads.of(*one)
                if head != heads.of(*other):
                    return False
                tells = tells or bool(head.strip(b"\0"))
    return tells


class _Heads:
    """The first bytes of tensors; each file is opened once."""

    def __init__(self) -> None:
        self._readers: dict[tuple[int, str], Reader] = {}

    def __enter__(self) -> "_Heads":
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def of(self, files: Files, tensor: TensorInfo) -> bytes:
        """Those of a tensor; where they would have to be downloaded, the hash of the file that holds it."""
        if not files.is_local(tensor.file):
            return str(files.identity(tensor.file).get("sha256", "")).encode()
        key = id(files), tensor.file
        if key not in self._readers:
            self._readers[key] = files.reader(tensor.file)
        head = np.empty(min(tensor.nbytes, _LOOKED_AT_BYTES), np.uint8)
        self._readers[key].copy(tensor.begin, head)
        return head.tobytes()


def _other_base(checkpoint: Checkpoint) -> Iterator[str]:
    """What an adapter says of its base, where that is not the model that it is added to."""
    if checkpoint.adapter is None or not checkpoint.adapter.base:
        return
    made_for = checkpoint.adapter.base
    own = (checkpoint.files.label, checkpoint.config.get("_name_or_path"))
    if _plain(made_for) not in [_plain(name) for name in own if isinstance(name, str)]:
        yield (
            f"adapter {checkpoint.adapter.files.label} was made for {printable(made_for)}, here it is "
            f"added to {checkpoint.files.label}: is that the same model?"
        )


def _plain(name: str) -> str:
    """The last part of a path or a Hub id: a copy on this disk has no other."""
    return PurePosixPath(name.replace("\\", "/")).name.lower()
