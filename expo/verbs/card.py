"""`expo card`: the model card, from the manifest alone."""

from os import PathLike
from pathlib import Path

from expo.checkpoint.sidecars import CARD
from expo.errors import SpecError
from expo.output.manifest import AdapterManifest, Manifest, read_manifest
from expo.output.scores import read_scores
from expo.publishing.card import card as card_text
from expo.publishing.licences import Terms
from expo.publishing.licences import terms as terms_of
from expo.publishing.presentation import HEAT_MAP, on_top_of, present, presented
from expo.results import CardResult


def card(
    out: str | PathLike[str],
    *,
    results: str | PathLike[str] | None = None,
    license: str | None = None,
    write: bool = False,
) -> CardResult:
    """The model card of the folder `out`, which expo made; what a person wrote into its README stays.

    Args:
        results: a file of evaluation results (`expo.results/1`).
        license: an id of the Hub; by default the most restrictive of the parents', and none where
            theirs is not clear.
        write: also write it, with the heat map (where matplotlib is installed), `.eval_results/` and
            the notices that the licence asks for.

    Raises:
        SpecError: no such folder, or `results` or `license` cannot be used.
        CheckpointError: the folder has no manifest that can be read.
        OutputError: a file cannot be written.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise SpecError(f"{folder} is no directory: name what expo wrote")
    manifest = read_manifest(folder)
    measured = () if results is None else read_scores(Path(results))
    terms, warnings = _terms(manifest, license)
    if write:
        contents = presented(folder, manifest, terms=terms, results=measured)
        text, files = contents[CARD].decode(), present(folder, contents)
    else:
        files, image = (), HEAT_MAP if (folder / HEAT_MAP).exists() else None
        fresh = card_text(manifest, terms=terms, results=measured, image=image)
        text = on_top_of(folder, manifest, fresh)
    return CardResult(text, terms.id if terms else None, warnings, files)


def _terms(
    manifest: Manifest | AdapterManifest, asked: str | None
) -> tuple[Terms | None, tuple[str, ...]]:
    """The licence, and what its publisher should know; none where the parents' are not clear."""
    try:
        terms = terms_of(manifest, asked)
    except SpecError as error:
        if asked is not None:
            raise
        return None, (str(error),)
    return terms, terms.warnings
