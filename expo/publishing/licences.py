"""Under which licence a model made from others may be published, and what that asks for.

The texts were read where `link` leads. A row is what its licence asks of who passes a derived model on:
nothing here is legal advice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from expo.checkpoint.front_matter import FrontMatter
from expo.checkpoint.headers import printable
from expo.errors import SpecError
from expo.output.manifest import AdapterManifest, Manifest

_HUB = "https://huggingface.co"
_AGREEMENT = ("LICENSE*",)
_META = ("LICENSE*", "USE_POLICY*")
_ALIBABA = "Copyright (c) Alibaba Cloud. All Rights Reserved."


Parents = list[tuple[str, str | None]]


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A row of the table.

    `rank` grows with what is asked: 0 nothing, 1 the notice kept (MIT), 2 changes stated (Apache), 3 the
    authors named (CC-BY), 4 terms of its own, which join with no other licence of rank 4 but `includes`.
    `hub_id` is what the Hub calls it, "other" where it has no id: then `name` is the `license_name`.
    """

    rank: int = 4
    hub_id: str = ""
    name: str
    link: str
    notices: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    prefix: str = ""
    built_with: tuple[str, ...] = ()
    includes: tuple[str, ...] = ()
    forbids_derivatives: bool = False


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What publishing under a licence asks for.

    `id` is the Hub's (`license:`), `name` and `link` describe it. What is owed to any of the parents is in
    `notices` (lines of a NOTICE file and of the card), `files` (patterns of files that have to travel),
    `prefix` (what the model's name has to begin with, or "") and `built_with` (lines to display).
    `warnings` say what the publisher should make sure of.
    """

    id: str
    name: str
    link: str
    notices: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    prefix: str = ""
    built_with: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def allow_name(self, name: str) -> bool:
        """Whether a repository's name begins as it has to: `Llama-3-…` and `llama3…` alike."""
        return _letters(name).startswith(_letters(self.prefix))


def _letters(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum() or char == ".")


def terms(manifest: Manifest | AdapterManifest, asked: str | None = None) -> Terms:
    """The licence of a model: what was asked for, else the most restrictive of its parents'.

    Args:
        asked: an id of the Hub (`apache-2.0`), or a `license_name` of the table (`qwen-research`).

    Raises:
        SpecError: `asked` is not known; or none was asked for and a parent's licence is unknown, or two
            of them contradict each other; or a parent allows no derived model at all.
    """
    parents = parent_licences(manifest)
    for model, key in parents:
        if key in LICENCES and LICENCES[key].forbids_derivatives:
            raise SpecError(
                f"{model} is under {key}, which allows no derived model: ask its authors"
            )
    known = [(model, LICENCES[key]) for model, key in parents if key in LICENCES]
    if asked is None:
        return _joined(_most_restrictive(parents, known), known)
    if asked not in LICENCES:
        near = get_close_matches(asked, LICENCES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SpecError(f"--license {asked} is no licence that expo knows{hint}")
    chosen = LICENCES[asked]
    return _joined(chosen, known, tuple(_doubts(chosen, parents)))


def clear_terms(manifest: Manifest | AdapterManifest) -> Terms | None:
    """The licence that the parents' leave; None where that is not clear."""
    try:
        return terms(manifest)
    except SpecError:
        return None


def parent_licences(manifest: Manifest | AdapterManifest) -> list[tuple[str, str | None]]:
    """What the card of every model that went in calls its licence, None where it names none; the aligned
    model first."""
    sources = manifest.sources.items()
    found: dict[tuple[str, str | None], None] = {}
    for _, source in sorted(sources, key=lambda item: not item[0].startswith("aligned")):
        found[printable(source.model), _key(source.said)] = None
        if source.adapter is not None:
            found[printable(source.adapter), _key(source.adapter_said)] = None
    return list(found)


def _key(said: FrontMatter | None) -> str | None:
    """The row of the table that a card means, or the words of the card where there is none."""
    if said is None or said.license is None:
        return None
    licence = said.license.lower()
    if licence != "other":
        return licence
    name = (said.license_name or "other").lower()
    return _ALIASES.get(name, name)


def _most_restrictive(parents: Parents, known: list[tuple[str, Licence]]) -> Licence:
    for model, key in parents:
        if key not in LICENCES:
            said = (
                "names no licence"
                if key is None
                else f"says {printable(key)!r}, which expo does not know"
            )
            raise SpecError(
                f"the licence is not clear: the card of {model} {said}; say --license ID"
            )
    model, highest = max(known, key=lambda one: one[1].rank)  # of equals the first
    for other, licence in known:
        if highest.name in licence.includes:
            model, highest = other, licence
    for other, licence in known:
        if licence.rank == 4 and licence is not highest and licence.name not in highest.includes:
            raise SpecError(
                f"the licence is not clear: {model} is under {highest.name}, {other} under {licence.name}, "
                "and neither covers the other; say --license ID"
            )
    return highest


def _doubts(chosen: Licence, parents: Parents) -> Iterator[str]:
    for model, key in parents:
        licence = LICENCES.get(key or "")
        if licence is not None and _asks_more(licence, chosen):
            yield f"{model} is under {licence.name}: make sure that you may publish under {chosen.name}"
        elif licence is None and key is not None:
            words = printable(key)
            yield f"the card of {model} says {words!r}: make sure that {chosen.name} agrees with it"


def _asks_more(licence: Licence, chosen: Licence) -> bool:
    if licence.rank < 4 or chosen.rank < 4:
        return licence.rank > chosen.rank
    return licence is not chosen and licence.name not in chosen.includes


def _joined(
    chosen: Licence, known: list[tuple[str, Licence]], warnings: tuple[str, ...] = ()
) -> Terms:
    """What the chosen licence and those of the parents ask for together."""
    rows = (chosen, *(licence for _, licence in known))
    return Terms(
        id=chosen.hub_id,
        name=chosen.name,
        link=chosen.link,
        notices=_each(rows, "notices"),
        files=_each(rows, "files"),
        prefix=max((row.prefix for row in rows), key=len),
        built_with=_each(rows, "built_with"),
        warnings=warnings,
    )


def _each(rows: tuple[Licence, ...], field: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for row in rows for item in getattr(row, field)))


def _plain(rank: int, *ids: str) -> dict[str, Licence]:
    """Licences whose name is their id on the Hub."""
    return {
        id_: Licence(
            rank=rank,
            hub_id=id_,
            name=id_,
            link=_link(id_),
            forbids_derivatives="-nd-" in id_,
            includes=_noncommercial(id_),
        )
        for id_ in ids
    }


def _link(id_: str) -> str:
    if id_.startswith("cc-"):
        kind, _, version = id_.removeprefix("cc-").rpartition("-")
        return f"https://creativecommons.org/licenses/{kind}/{version}/"
    return _TEXTS.get(id_, f"{_HUB}/docs/hub/repositories-licenses")


def _noncommercial(id_: str) -> tuple[str, ...]:
    """CC-BY-NC-SA asks all that CC-BY-NC and CC-BY-SA of its version ask."""
    if not id_.startswith("cc-by-nc-sa-"):
        return ()
    version = id_.rpartition("-")[2]
    return (f"cc-by-nc-{version}", f"cc-by-sa-{version}")


def _llama(id_: str, name: str, copyright_: str, prefix: str, built_with: str) -> Licence:
    return Licence(
        hub_id=id_,
        name=id_,
        link=f"https://www.llama.com/{id_.replace('.', '_')}/license/",
        notices=(f"{name} is licensed under the {copyright_}",),
        files=_META,
        prefix=prefix,
        built_with=(built_with,) if built_with else (),
    )


def _named(name: str, link: str, *, notice: str = "", built_with: tuple[str, ...] = ()) -> Licence:
    """Licences that the Hub has no id for."""
    notices = (notice,) if notice else ()
    return Licence(
        hub_id="other",
        name=name,
        link=link,
        notices=notices,
        files=_AGREEMENT,
        built_with=built_with,
    )


_TEXTS = {
    "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "mit": "https://opensource.org/license/mit",
}
_META_OWNS = "Copyright © Meta Platforms, Inc. All Rights Reserved."

LICENCES: dict[str, Licence] = {
    **_plain(0, "cc0-1.0", "unlicense", "wtfpl", "pddl"),
    **_plain(
        1, "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "ncsa", "postgresql",
        "bsl-1.0", "ms-pl", "open-mdw", "cdla-permissive-1.0", "cdla-permissive-2.0",
    ),
    **_plain(2, "apache-2.0"),
    **_plain(2, "afl-3.0", "artistic-2.0", "ecl-2.0", "etalab-2.0"),
    **_plain(3, "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by"),
    **_plain(
        4, "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    ),
    **_plain(
        4, "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "osl-3.0", "epl-1.0",
        "epl-2.0", "eupl-1.1", "eupl-1.2", "gfdl", "odbl", "ofl-1.1", "cdla-sharing-1.0", "c-uda",
    ),
    **_plain(
        4, "openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0", "deepfloyd-if-license", "fair-noncommercial-research-license", "h-research",
        "intel-research", "apple-ascl", "apple-amlr",
    ),
    "llama2": _llama("llama2", "Llama 2", "LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.", "", ""),
    "llama3": _llama("llama3", "Meta Llama 3", f"Meta Llama 3 Community License, {_META_OWNS}", "Llama-3", "Built with Meta Llama 3"),
    **{
        f"llama{version}": _llama(f"llama{version}", f"Llama {version}", f"Llama {version} Community License, {_META_OWNS}", "Llama", "Built with Llama")
        for version in ("3.1", "3.2", "3.3", "4")
    },
    "gemma": Licence(
        hub_id="gemma", name="gemma", link="https://ai.google.dev/gemma/terms",
        notices=("Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",),
    ),
    "qwen": _named("qwen", f"{_HUB}/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE", notice=f"Qwen is licensed under the Qwen LICENSE AGREEMENT, {_ALIBABA}", built_with=("Built with Qwen",)),
    "qwen-research": _named("qwen-research", f"{_HUB}/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE", notice=f"Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, {_ALIBABA}", built_with=("Built with Qwen",)),
    "tongyi-qianwen": _named("tongyi-qianwen", f"{_HUB}/Qwen/Qwen1.5-7B-Chat/blob/main/LICENSE", notice=f"Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, {_ALIBABA}"),
    "deepseek": _named("deepseek", "https://github.com/deepseek-ai/DeepSeek-LLM/blob/main/LICENSE-MODEL"),
}  # fmt: skip
"""By what `--license` takes: the Hub's ids, and the names of licences that it has no id for."""

_ALIASES = {
    "deepseek-license": "deepseek",
    "deepseek-model-license": "deepseek",
    "gemma-terms-of-use": "gemma",
    "llama-3": "llama3",
    "llama-3.1": "llama3.1",
    "qwen-license": "qwen",
    "qwen-research-license": "qwen-research",
    "tongyi-qianwen-license": "tongyi-qianwen",
    "tongyi-qianwen-research": "qwen-research",
}
"""Names under which cards have them as `license_name`."""
