"""The models of a merge by what they are for, and how messages speak of them."""

from dataclasses import dataclass

from expo.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Models:
    """The models of a merge by what they are for.

    `operands` come in the order of the spec, without the base unless the method treats it as one of them;
    `base` is None then.
    """

    donor: Checkpoint
    base: Checkpoint | None
    onto: Checkpoint | None
    operands: tuple[Checkpoint, ...]
    is_pair: bool
    compares: bool = False

    @property
    def others(self) -> tuple[Checkpoint, ...]:
        """All but the donor, each once."""
        named = (self.base, self.onto, *self.operands)
        others = {id(c): c for c in named if c is not None and c is not self.donor}
        return tuple(others.values())

    @property
    def all_names(self) -> str:
        if self.is_pair:
            return "SFT and aligned"
        return ", ".join(c.label for c in (*self.others, self.donor))

    def place(self, checkpoint: Checkpoint) -> str:
        """`in SFT`, `in org/name`: for what differs."""
        if self.is_pair:
            return "in aligned" if checkpoint is self.donor else "in SFT"
        return f"in {checkpoint.label}"

    def full_place(self, checkpoint: Checkpoint) -> str:
        """`in the SFT model`, `in org/name`: for what only one of them has."""
        return f"in {self.name(checkpoint)}"

    def name(self, checkpoint: Checkpoint) -> str:
        if self.is_pair:
            return f"the {'aligned' if checkpoint is self.donor else 'SFT'} model"
        return checkpoint.label
