"""The table of licences: what is chosen from the parents', what is owed, what is refused."""

from dataclasses import replace

import pytest

from expo.checkpoint.front_matter import FrontMatter, front_matter
from expo.compute.summary import statistics
from expo.errors import SpecError
from expo.operators.statistics import Sums
from expo.output.manifest import Manifest, SourceEntry
from expo.publishing.licences import LICENCES, clear_terms, terms

STARLING, OPENCHAT = "Nexusflow/Starling-LM-7B-beta", "openchat/openchat-3.5-0106"


def made_from(aligned: FrontMatter | None, sft: FrontMatter | None) -> Manifest:
    return Manifest(
        plan="",
        method="expo",
        sources={
            "sft": SourceEntry(OPENCHAT, "c" * 40, None, None, sft),
            "aligned": SourceEntry(STARLING, "d" * 40, None, None, aligned),
        },
        inputs={},
        seed=0,
        statistics=statistics(Sums()),
        notes=(),
        warnings=(),
        files={},
    )


def under(aligned: str | None, sft: str | None) -> Manifest:
    """Licences by what a card says; `other:NAME` for a `license_name`."""

    def said(text: str | None) -> FrontMatter:
        licence, _, name = (text or "").partition(":")
        return FrontMatter(license=licence or None, license_name=name or None)

    return made_from(said(aligned), said(sft))


@pytest.mark.parametrize(
    ("aligned", "sft", "chosen"),
    [
        ("apache-2.0", "apache-2.0", "apache-2.0"),
        ("Apache-2.0", "mit", "apache-2.0"),
        ("mit", "bsd-3-clause", "mit"),
        ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("mit", "llama3", "llama3"),
        ("gemma", "apache-2.0", "gemma"),
        ("apache-2.0", "other:qwen-research-license", "other"),
        ("other:deepseek", "mit", "other"),
    ],
)
def test_the_more_restrictive_of_the_parents(aligned: str, sft: str, chosen: str) -> None:
    assert terms(under(aligned, sft)).id == chosen


@pytest.mark.parametrize(
    ("aligned", "sft", "words"),
    [
        (None, "mit", f"the card of {STARLING} names no licence; say --license ID"),
        ("mit", "my-own", f"the card of {OPENCHAT} says 'my-own', which expo does not know"),
        ("other", "mit", "says 'other', which expo does not know; say --license ID"),
        ("llama3", "gemma", "is under llama3, openchat/openchat-3.5-0106 under gemma, and neither"),
        ("llama3.1", "llama3", "neither covers the other; say --license ID"),
        ("cc-by-sa-4.0", "cc-by-nc-4.0", "neither covers the other; say --license ID"),
    ],
)
def test_what_is_not_clear_is_refused(aligned: str | None, sft: str, words: str) -> None:
    with pytest.raises(SpecError) as error:
        terms(under(aligned, sft))
    assert words in str(error.value)
    assert "--license" in str(error.value)
    assert clear_terms(under(aligned, sft)) is None
    assert terms(under(aligned, sft), "apache-2.0").id == "apache-2.0"


def test_what_is_asked_for_is_taken_and_doubted() -> None:
    found = terms(under("apache-2.0", "cc-by-nc-4.0"), "apache-2.0")
    assert found.warnings == (
        f"{OPENCHAT} is under cc-by-nc-4.0: make sure that you may publish under apache-2.0",
    )
    found = terms(under("mine", None), "mit")
    assert found.warnings == (
        f"the card of {STARLING} says 'mine': make sure that mit agrees with it",
    )
    assert terms(under("mit", "mit"), "apache-2.0").warnings == ()
    with pytest.raises(
        SpecError, match=r"--license apache-2 is no licence .* did you mean apache-2.0\?"
    ):
        terms(under("mit", "mit"), "apache-2")


@pytest.mark.parametrize("asked", [None, "mit"])
def test_no_derivatives_means_no_merge(asked: str | None) -> None:
    with pytest.raises(
        SpecError, match=r"openchat-3\.5-0106 is under cc-by-nc-nd-4\.0, which allows no"
    ):
        terms(under("apache-2.0", "cc-by-nc-nd-4.0"), asked)


def test_what_is_owed_to_any_parent_is_owed() -> None:
    llama = terms(under("apache-2.0", "llama3"))
    assert llama.prefix == "Llama-3"
    assert llama.built_with == ("Built with Meta Llama 3",)
    assert llama.files == ("LICENSE*", "USE_POLICY*")
    assert "Meta Llama 3 Community License, Copyright © Meta Platforms" in llama.notices[0]
    names = ("Llama-3-8B-SimPO", "llama3-mine", "Llama_3.mine")
    assert all(map(llama.allow_name, names))
    assert not llama.allow_name("SimPO-Llama-3")
    both = terms(under("llama3.1", "llama3"), "llama3.1")
    assert both.built_with == ("Built with Llama", "Built with Meta Llama 3")
    assert both.prefix == "Llama-3"
    qwen = terms(under("other:qwen", "apache-2.0"))
    assert (qwen.id, qwen.name, qwen.built_with) == ("other", "qwen", ("Built with Qwen",))
    assert terms(under("gemma", "gemma")).notices[0].endswith("ai.google.dev/gemma/terms")
    assert terms(under("mit", "mit")).allow_name("anything")


def test_the_adapter_has_a_licence_of_its_own() -> None:
    manifest = under("apache-2.0", "apache-2.0")
    adapted = replace(
        manifest.sources["aligned"],
        adapter="org/lora",
        adapter_said=FrontMatter(license="cc-by-nc-4.0"),
    )
    sources = {**manifest.sources, "aligned": adapted}
    assert terms(replace(manifest, sources=sources)).id == "cc-by-nc-4.0"


def test_every_row_leads_somewhere() -> None:
    for key, row in LICENCES.items():
        assert row.link.startswith("https://"), key
        assert row.hub_id in (key, "other"), key
        assert row.name == key, key
        assert set(row.includes) <= LICENCES.keys() | {"cc-by-sa-2.0"}, key
    assert LICENCES["cc-by-nc-4.0"].link == "https://creativecommons.org/licenses/by-nc/4.0/"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("\n---\r\nlicense: [mit]\r\n---\r\n", {"license": ["mit"]}),
        ("# no block", None),
        ("---\n- a list\n---\n", None),
        ("---\na: [\n---\n", None),
    ],
)
def test_front_matter_of_any_kind(text: str, found: dict | None) -> None:
    assert front_matter(text) == found
