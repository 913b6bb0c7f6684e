"""A model in memory whose parameters are set, in place, to what a plan would write."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expo.compute.stream import tensors
from expo.output.folder import write_small_files
from expo.planning.plan import Plan
from expo.sampling.loading import check_whole, one_line, read_model
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
    what = f"{plan.donor.label} does not load through transformers"
    with temporary_folder() as folder, one_line(what):
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
    model, missing = read_model(kind, None, config=config, state_dict=given)
    check_whole(missing)
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
