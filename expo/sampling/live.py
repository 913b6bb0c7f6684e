"""A model in memory whose parameters are set, in place, to what a plan would write."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

from expo.compute.stream import tensors
from expo.errors import CheckpointError
from expo.output.durable import is_full, unwritable
from expo.output.folder import write_small_files
from expo.planning.plan import Plan
from expo.sampling.resident import Resident, has_room, keep_resident, switch, without
from expo.temporary import temporary_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Live:
    """A model that runs, the plan whose weights it has, and the slots that they are set through.

    `slots` are the tensors of the module that hold a checkpoint's tensor of that name as it is. They
    are empty where transformers fuses or permutes some on loading: then its loader does the work.
    `resident` are both sides of tensors that are computed where the model is.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    slots: "dict[str, Tensor]"
    plan: Plan | None
    resident: Resident = field(default_factory=dict)

    def set(self, plan: Plan) -> None:
        """Give the model the weights that `plan` would write, bit for bit.

        Args:
            plan: the one that it was built from, or that one for another α (`Plan.at`).

        Raises:
            CheckpointError: an input is damaged, or a result is not finite.
        """
        import torch

        if plan is self.plan:
            return
        self.plan = None  # until all of it is there
        with torch.no_grad():
            if self.slots:
                self._fill(plan)
            else:
                fresh = _loaded(type(self.model), self.model.config, dict(tensors(plan)))
                weights = self.model.state_dict()
                for name, tensor in fresh.state_dict().items():
                    weights[name].copy_(tensor)
        self.plan = plan

    def _fill(self, plan: Plan) -> None:
        switch(plan, self.resident, self.slots)
        for name, tensor in tensors(without(plan, self.resident)):
            if name in self.slots:
                self.slots[name].copy_(tensor)


def build(plan: Plan, *, device: "str | torch.device" = "cpu") -> Live:
    """The model of `plan`, with its tokenizer, on `device`. Nothing is written but a few small files for
    the time of the call.

    Raises:
        CheckpointError: transformers does not know the architecture, or the checkpoint is incomplete.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    given = dict(tensors(plan))
    with temporary_folder() as folder, _one_line(plan):
        write_small_files(plan, folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model = _loaded(type(shell), shell.config, given)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    same = _same(model, given)
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
    weights = model.state_dict()
    slots = {name: weights[name] for name in same}
    live = Live(model, tokenizer, slots, plan)
    if has_room(plan, model.device):
        live.resident = keep_resident(plan, slots)
    return live


def _loaded(
    kind: "type[PreTrainedModel]", config: object, given: "dict[str, Tensor]"
) -> "PreTrainedModel":
    """The model that transformers makes of a checkpoint's tensors, as it would of its files."""
    with quiet():
        model, found = kind.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            None,
            config=config,  # pyright: ignore[reportArgumentType]
            state_dict=given,
            dtype="auto",
            output_loading_info=True,
        )
    if lacking := sorted({*found["missing_keys"], *found["mismatched_keys"]}):
        raise CheckpointError(
            f"the checkpoint lacks {lacking[0]} and {len(lacking) - 1} more that the model has: "
            "run expo verify on it"
        )
    return model


def _same(model: "PreTrainedModel", given: "dict[str, Tensor]") -> list[str]:
    """The names under which the module holds the given tensors unchanged; none where others are needed.

    Compared value by value: a loader may permute a tensor and leave its name and shape.
    """
    import torch

    weights = model.state_dict()
    same = [
        name
        for name, tensor in given.items()
        if name in weights
        and weights[name].shape == tensor.shape
        and torch.equal(weights[name], tensor.to(weights[name].dtype))
    ]
    filled = {weights[name].data_ptr() for name in same}
    return same if all(w.data_ptr() in filled for w in weights.values()) else []


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bar and its report: what matters of it is raised."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


@contextmanager
def _one_line(plan: Plan) -> Iterator[None]:
    """What transformers says about a model that it cannot load, as one line."""
    try:
        yield
    except (ValueError, KeyError, OSError, ImportError) as error:
        if isinstance(error, OSError) and is_full(
            error
        ):  # of the few small files, not of the model
            raise unwritable(error, Path(gettempdir())) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{plan.donor.label} does not load through transformers: {first}"
        ) from error
