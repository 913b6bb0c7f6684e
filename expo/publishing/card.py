"""The model card, from the manifest alone, and a card that a person has edited, renewed."""

import re
from collections.abc import Sequence

from expo.checkpoint.front_matter import FrontMatter, front_matter
from expo.checkpoint.sidecars import CARD
from expo.errors import CheckpointError
from expo.output.manifest import AdapterManifest, Manifest
from expo.publishing import adapter_sections, sections
from expo.publishing.licences import Terms, clear_terms
from expo.results import Score

BEGIN = "<!-- expo: from here on written by expo; what you change is lost when it is renewed -->"
END = "<!-- expo: up to here -->"

_BLOCK = re.compile(re.escape(BEGIN) + r".*" + re.escape(END), re.S)  # a template may render END
_FRONT = re.compile(r"\s*---\r?\n.*?\r?\n---[ \t]*(?:\r?\n|$)", re.S)


def card(
    manifest: Manifest | AdapterManifest,
    *,
    terms: Terms | None = None,
    results: Sequence[Score] = (),
    image: str | None = None,
    repo_id: str | None = None,
) -> str:
    """The card as a Hub visitor reads it: front matter, a title, and a block that expo renews.

    Args:
        terms: the licence; by default that of the parents, and none where theirs is not clear.
        results: of evaluations, as `read_scores` reads them.
        image: name of the heat map that lies beside the card, if one does.
        repo_id: where it is published, for the snippet that loads it.
    """
    if terms is None:
        terms = clear_terms(manifest)
    measured = tuple(results)
    if isinstance(manifest, AdapterManifest):
        title = adapter_sections.title(manifest)
        body = adapter_sections.body(manifest, measured, image, repo_id)
    else:
        title = sections.title(manifest)
        body = sections.body(manifest, measured, image, repo_id)
    body = [*body, *sections.licence(manifest, terms), *sections.citation(manifest)]
    text = _front(_keys(manifest, terms))
    return f"{text}\n# {title}\n\n{BEGIN}\n\n" + "\n".join(body).strip() + f"\n\n{END}\n"


def renewed(existing: str, card: str) -> str:
    """A README that a person has edited, with what is expo's brought up to date and the rest kept.

    expo's are the keys of the front matter that `card` has (of `tags` the person's own stay) and the
    marked block. A README without the marks keeps all of its text.

    Raises:
        CheckpointError: what should be its front matter is none.
    """
    begun, theirs, ours = _FRONT.match(existing), front_matter(existing), front_matter(card) or {}
    if begun and theirs is None:
        raise CheckpointError(
            f"{CARD}: its front matter is not valid: correct the lines between the --- at its top"
        )
    theirs = theirs or {}
    tags = [*_tags(ours), *(tag for tag in _tags(theirs) if tag not in _tags(ours))]
    keys = theirs | ours | ({"tags": tags} if tags else {})
    text = existing[begun.end() :] if begun else existing
    block = _BLOCK.search(card)
    assert block is not None
    return _front(keys) + _BLOCK.sub(lambda _: block[0], text, count=1)


def _tags(keys: dict) -> list:
    tags = keys.get("tags")
    return tags if isinstance(tags, list) else []


def _keys(manifest: Manifest | AdapterManifest, terms: Terms | None) -> dict:
    from huggingface_hub import ModelCardData

    is_adapter = isinstance(manifest, AdapterManifest)
    parents = _parents(manifest)
    said = _donor_said(manifest)
    named = terms is not None and terms.id == "other"
    data = ModelCardData(
        base_model=parents or None,
        library_name=_library(manifest),
        tags=["lora", "expo"] if is_adapter else ["merge", _kind(manifest)],
        license=terms.id if terms else None,
        license_name=terms.name if terms and named else None,
        license_link=terms.link if terms and named else None,
        pipeline_tag=said.pipeline_tag if said else None,
        language=list(said.language) if said and said.language else None,
        datasets=list(said.datasets) if said and said.datasets else None,
    )
    relation = {"base_model_relation": "adapter" if is_adapter else "merge"} if parents else {}
    return data.to_dict() | relation


def _library(manifest: Manifest | AdapterManifest) -> str | None:
    if isinstance(manifest, AdapterManifest):
        return "peft"
    return "transformers" if manifest.is_of_transformers else None


def _kind(manifest: Manifest | AdapterManifest) -> str:
    return (
        "expo" if isinstance(manifest, AdapterManifest) or manifest.method == "expo" else "mergekit"
    )


def _parents(manifest: Manifest | AdapterManifest) -> list[str]:
    """The models of the Hub that it was made from, the aligned ones first. An adapter is of one model."""
    if isinstance(manifest, AdapterManifest):
        sft = manifest.sources["sft"]
        return [sft.model] if sft.commit else []
    names: dict[str, None] = {}
    for source in reversed(manifest.sources.values()):
        if source.adapter_commit:
            names[str(source.adapter)] = None
        if source.commit:
            names[source.model] = None
    return list(names)


def _donor_said(manifest: Manifest | AdapterManifest) -> FrontMatter | None:
    if isinstance(manifest, AdapterManifest):
        donor = manifest.sources.get("aligned")
    else:
        labels = {source.label: source for source in manifest.sources.values()}
        donor = labels.get(manifest.donor or "")
    return None if donor is None else donor.adapter_said or donor.said


def _front(keys: dict) -> str:
    from huggingface_hub.repocard_data import CardData

    data = CardData(**{str(key): value for key, value in keys.items()})
    return f"---\n{data.to_yaml()}\n---\n"
