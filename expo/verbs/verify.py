"""`expo verify`: is a model directory whole, does it tokenize and speak as it should."""

from os import PathLike
from pathlib import Path

from expo.checkpoint.checkpoint import open_checkpoint
from expo.checkpoint.reference import parse_reference
from expo.publishing.signature import check_signature
from expo.results import VerifyResult
from expo.verification.golden import read_golden
from expo.verification.run import Progress, check_model, verify_folder


def verify(
    out: str | PathLike[str],
    *,
    against: str | PathLike[str] | None = None,
    vectors: str | PathLike[str] | None = None,
    quick: bool = False,
    generate: bool = False,
    signature: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Whether the model `out`, a directory or one safetensors file, is whole, tokenizes and speaks as it should.

    Tokenizer and template are tried in child processes: offline, without secrets or remote code.

    Args:
        against: the aligned model, to compare with: a directory, a Hub id, or `model+adapter`.
        vectors: a file of golden vectors (`expo.golden/1`).
        quick: read headers, configuration and tokenizer only, not the tensors.
        generate: build the model for real (in its size of memory) and let it answer.
        signature: the EC public key (PEM) that `model.sig` of `out` was made with: whether the files are
            those that were signed.
        progress: called with (bytes read, bytes in all).

    Raises:
        SpecError: no such directory or file, invalid vectors, or no such key. What is wrong inside of `out` is a finding.
        CheckpointError, HubError: `against` cannot be read.
    """
    check_model(Path(out))
    golden = None if vectors is None else read_golden(Path(vectors))
    aligned = None
    if against is not None:
        aligned = open_checkpoint(parse_reference(str(against), role="ALIGNED"))
    # Signed or not, and by whom, is asked before a minute of reading.
    signed = () if signature is None else (check_signature(Path(out), Path(signature)),)
    found = verify_folder(
        Path(out),
        aligned=aligned,
        golden=golden,
        quick=quick,
        generate=generate,
        progress=progress,
    )
    ok = found.ok and all(check.status == "pass" for check in signed)
    return VerifyResult(ok, (*signed, *found.checks))
