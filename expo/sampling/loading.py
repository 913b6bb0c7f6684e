"""Models through transformers' loader: quietly, whole, and what fails in one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from expo.errors import CheckpointError
from expo.output.durable import is_full, unwritable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_model(
    kind: type, where: object, **how: object
) -> "tuple[PreTrainedModel, tuple[str, ...]]":
    """The model that the class (or auto class) `kind` makes of `where`, in its own dtype, and the names of
    the weights that it has and the checkpoint lacks.

    Raises:
        CheckpointError: a weight has another shape than the config says.
        What transformers raises: `one_line` says it.
    """
    with quiet():
        model, found = kind.from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            where,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **how,
        )
    if others := sorted(map(_name, found["mismatched_keys"])):
        raise CheckpointError(
            f"{_counted(others)}: another shape in the checkpoint than its config.json says: put the "
            "config.json beside it that it was trained with"
        )
    return model, tuple(sorted(found["missing_keys"]))


def check_whole(missing: tuple[str, ...], what: str = "the checkpoint") -> None:
    """Refuse weights that transformers would make up.

    Raises:
        CheckpointError: there are some.
    """
    if missing:
        raise CheckpointError(
            f"{what} lacks {_counted(missing)} that the model has: run expo verify on it"
        )


@contextmanager
def one_line(what: str, *, cure: str = "") -> Iterator[None]:
    """What transformers says about a model that it cannot load, as one line.

    Raises:
        CheckpointError: it cannot. OutputError: the disk of the temporary folder is full.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, KeyError, OSError, ImportError, SafetensorError) as error:
        if isinstance(error, OSError) and is_full(error):  # of small files, not of the model
            raise unwritable(error, Path(gettempdir())) from error
        first = (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")
        raise CheckpointError(f"{what}: {first}{cure}") from error


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


def _counted(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _name(entry: Any) -> str:
    """Of a weight of another shape: some releases give its shapes beside it."""
    return entry if isinstance(entry, str) else str(entry[0])
