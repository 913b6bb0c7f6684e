"""Asking a model in this process, through transformers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from expo.checkpoint.reference import Location, parse_loadable
from expo.compute.devices import for_models
from expo.evaluation.answers import Reply
from expo.sampling.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Local:
    """A model, loaded when it is first asked, that decodes by its own generation config or a preset.

    `num_beams` above 1 searches for the likeliest answer and draws nothing.
    """

    place: Location
    preset: str | None = None
    num_beams: int = 1
    batch_size: int = 16
    device: str | None = None
    threads: int = 1

    @property
    def name(self) -> str:
        return str(self.place if self.place.path is None else self.place.path.resolve().name)

    @property
    def parts(self) -> dict[str, str]:
        """What of it decides the answers."""
        known = {"preset": str(self.preset), "num_beams": str(self.num_beams)}
        return known | {"model": f"{self.place} {_stamps(self.place.path)}"}

    def ask(
        self, prompts: Sequence[Prompt], *, settings: Mapping[str, float], seed: int
    ) -> list[Reply]:
        """One answer to every prompt, in their order.

        Raises:
            SpecError: a setting is out of range.
            CheckpointError: the model does not load, or its template or context is not made for a prompt.
        """
        from expo.sampling.beams import beam_search
        from expo.sampling.decoding import decoding
        from expo.sampling.generate import generate

        model, tokenizer = self._loaded
        assert model.generation_config is not None
        how = decoding(model.generation_config, self.preset, **settings)
        if self.num_beams > 1:
            length = how.max_new_tokens
            samples = beam_search(
                model, tokenizer, prompts, num_beams=self.num_beams, max_new_tokens=length
            )
        else:
            size = self.batch_size
            samples = generate(model, tokenizer, prompts, decoding=how, seed=seed, batch_size=size)
        return [Reply(s.text, s.length, s.finish_reason) for s in samples]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse what cannot be answered before anything is.

        Raises:
            CheckpointError: the model does not load, or its template or context is not made for a prompt.
        """
        from expo.sampling.generate import check_fit

        check_fit(*self._loaded, prompts)

    def close(self) -> None:
        """Forget the model, for whatever needs its memory next."""
        if self.__dict__.pop("_loaded", None) is not None:
            import torch

            torch.cuda.empty_cache()

    @cached_property
    def _loaded(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from expo.sampling.loading import check_whole, one_line, read_model

        where = str(self.place.path or self.place.repo_id)
        known = {"revision": self.place.revision, "trust_remote_code": False}
        with one_line(f"{self.place} does not load through transformers"):
            tokenizer = AutoTokenizer.from_pretrained(where, **known)
            model, missing = read_model(AutoModelForCausalLM, where, **known)
        check_whole(missing, str(self.place))
        device = for_models(self.device)
        return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def open_local(
    model: str,
    *,
    preset: str | None,
    num_beams: int,
    batch_size: int,
    device: str | None = None,
) -> Local:
    """The model of a directory or of a Hub id.

    Raises:
        SpecError: it is neither.
    """
    return Local(parse_loadable(model, role="MODEL"), preset, num_beams, batch_size, device)


def _is_read(file: Path) -> bool:
    """Whether a loader may read it: answers of this very run may come to lie beside it."""
    return not file.name.startswith(".") and file.suffix != ".jsonl"


def _stamps(folder: Path | None) -> str:
    """What tells a folder from a changed one."""
    if folder is None:
        return ""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _is_read(file))
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
