"""Why a tensor is unlike the aligned model's: small samples of both are compared."""

from typing import TYPE_CHECKING

from expo.checkpoint.dtypes import TORCH_NAMES
from expo.checkpoint.files import Files
from expo.checkpoint.headers import TensorInfo, printable
from expo.checkpoint.names import is_embedding
from expo.checkpoint.weight import Weight
from expo.verification.beside import Beside, is_beside
from expo.verification.subject import Subject

if TYPE_CHECKING:
    import torch

_SAMPLE = 1 << 14  # elements
_BLOCK = 64  # rows and columns of a square matrix
_ALIKE = 0.8  # cosine


def cause(s: Subject, name: str) -> str | None:
    """What the tensor of this name is instead of the aligned model's, where a sample shows it."""
    with Beside(s.aligned) as beside:
        return _found(s, name, beside)


def _found(s: Subject, name: str, beside: Beside) -> str | None:
    tensor, aligned = s.tensors[name], s.donor.weights
    weight, is_matrix = aligned[name], len(tensor.shape) == 2
    if is_matrix and tensor.shape[0] == tensor.shape[1] and _is_transposed(s, tensor, weight, beside):  # fmt: skip
        return "is transposed"
    mine = _sample(s.out, tensor)
    if is_embedding(name) and is_matrix:
        for shift in (1, -1):
            if _alike(*_shifted(mine, _theirs(beside, weight), shift * tensor.shape[1])):
                return "has its rows moved by one"
    for other, candidate in aligned.items():
        same = candidate.shape == tensor.shape and other != name and is_beside(candidate)
        if same and _alike(mine, _theirs(beside, candidate)):
            return f"is the aligned model's {printable(other)}"
    return None


def _is_transposed(s: Subject, tensor: TensorInfo, weight: Weight, beside: Beside) -> bool:
    n = tensor.shape[0]
    k = min(n, _BLOCK)
    mine = _sample(s.out, tensor, k * n).view(k, n)[:, :k]
    theirs = _theirs(beside, weight, k * n).view(k, n)[:, :k]
    return _alike(mine.reshape(-1), theirs.T.reshape(-1))


def _theirs(beside: Beside, weight: Weight, count: int = _SAMPLE) -> "torch.Tensor":
    """The first elements of the aligned model's, as float32 [≤ count]."""
    return beside.elements(weight, 0, min(count, weight.count)).float()


def _sample(files: Files, stored: TensorInfo, count: int = _SAMPLE) -> "torch.Tensor":
    """The first elements, as float32 [≤ count]."""
    import torch

    nbytes = min(count, stored.count) * stored.item_bytes
    raw = bytearray(files.read(stored.file, stored.begin, stored.begin + nbytes))
    return torch.frombuffer(raw, dtype=getattr(torch, TORCH_NAMES[stored.dtype])).float()


def _shifted(mine: "torch.Tensor", theirs: "torch.Tensor", by: int) -> tuple:
    return (mine[by:], theirs[:-by]) if by > 0 else (mine[:by], theirs[-by:])


def _alike(a: "torch.Tensor", b: "torch.Tensor") -> bool:
    length = min(len(a), len(b))
    a, b = a[:length], b[:length]
    return length > 0 and float(a @ b) > _ALIKE * float(a.norm() * b.norm()) > 0
