"""The numbers that a spec gives to each tensor: settings resolved by name, layer and slice."""

from expo.checkpoint.checkpoint import Checkpoint
from expo.checkpoint.names import INPUTS, is_of_kind
from expo.operators.methods import Default
from expo.planning.modules import module_of
from expo.spec.request import Request, Slice
from expo.spec.settings import Scalar, first_value


def layer_count(checkpoint: Checkpoint) -> int:
    """How many layers the tensors of a model belong to."""
    numbers = [layer for name in checkpoint.weights if (layer := module_of(name)[0]) is not None]
    return max(numbers, default=-1) + 1


class Values:
    """Looks up parameters by precedence: operand, slice, spec, default."""

    def __init__(self, request: Request, donor: Checkpoint) -> None:
        self._request = request
        self.layers = layer_count(donor)

    def of_operand(self, number: int, key: str, default: Default, name: str) -> Scalar | None:
        """A parameter of one model for one tensor; None where it is required and missing."""
        slice_, depth = self._place(name)
        operand = slice_.operands[number]
        scopes = (operand.settings, slice_.settings, self._request.settings)
        value = first_value(scopes, key, name, depth)
        return default if value is None else value

    def shared(self, key: str, default: Default, name: str) -> Scalar | None:
        """A parameter of the whole merge for one tensor."""
        slice_, depth = self._place(name)
        value = first_value((slice_.settings, self._request.settings), key, name, depth)
        return default if value is None else value

    def stays(self, name: str) -> bool:
        """Whether the spec leaves a tensor as the donor has it."""
        request, (layer, _) = self._request, module_of(name)
        fixed = layer is not None and (
            layer < request.fixed_first_layers or layer >= self.layers - request.fixed_last_layers
        )
        return fixed or is_of_kind(name, request.excluded)

    def _place(self, name: str) -> tuple[Slice, float]:
        """The slice that a tensor belongs to, and how deep in it: 0 … 1."""
        layer, _ = module_of(name)
        slices = self._request.slices
        if layer is None:
            return (slices[0] if name.endswith(INPUTS) else slices[-1]), 0.0
        for slice_ in slices:
            first, end = slice_.layers or (0, self.layers)
            if first <= layer < end:
                return slice_, (layer - first) / (end - first - 1) if end - first > 1 else 1.0
        raise AssertionError(f"no slice holds layer {layer}")  # build_plan has checked the cover
