"""Every error that expo raises on purpose.

ExpoError                 exit 1: the run failed, one line says what, where and the cure
├── SpecError             exit 2: the request itself is invalid
├── CheckpointError       a checkpoint on disk cannot be used as it is
│   └── MistakenFileError   a file is a pointer or a page, not what its name says
├── TokenizerError        a tokenizer cannot be read or does not fit
├── HubError              the Hub could not be reached or refused
├── EndpointError         a server of models did not answer, or refused
├── OutputError           OUT cannot be written, is taken, or ran out of space
│   └── BusyError           another process is at it
└── VerificationError     exit 3: a model does not verify, so it is not published
"""

_LONGEST = 860
"""Characters of a message: what it quotes may be megabytes."""
_MOST_LINES, _LONGEST_OF_SEVERAL = 12, 300


class ExpoError(Exception):
    """A failure whose message is one line for the user: what, where, the cure; of several faults one line each.

    What a line quotes from outside does not break it, and is cut in the middle where it is long: what and where
    stand at the beginning, the cure at the end.
    """

    def __init__(self, *lines: str) -> None:
        longest = _LONGEST if len(lines) == 1 else _LONGEST_OF_SEVERAL
        kept = [_one_line(line, longest) for line in lines[:_MOST_LINES]]
        more = [f"and {len(lines) - len(kept)} more"] if len(lines) > len(kept) else []
        super().__init__("\n".join([*kept, *more]))


class SpecError(ExpoError):
    """The spec or the flags ask for something that is invalid or contradictory."""


class CheckpointError(ExpoError):
    """An input checkpoint is damaged, unsupported, or does not fit the other one."""


class MistakenFileError(CheckpointError):
    """A download has left something else under the name of a file: a Git LFS pointer, a web page."""


class TokenizerError(ExpoError):
    """A tokenizer cannot be read or does not fit the model."""


class HubError(ExpoError):
    """The Hub did not answer, refused, or has no such repository or revision."""


class EndpointError(ExpoError):
    """A server of models did not answer, refused, or does not speak as OpenAI's does."""


class OutputError(ExpoError):
    """The output directory cannot be written, is in use, or ran out of space."""


class BusyError(OutputError):
    """Another process is at the output."""


class VerificationError(ExpoError):
    """A model does not verify, or is no longer the one that was verified."""


def _one_line(text: str, longest: int) -> str:
    """The text with its line breaks written out, and without its middle where it is too long."""
    return _cut("\\n".join(_cut(text, longest).splitlines()), longest)


def _cut(text: str, longest: int) -> str:
    tail = longest // 3
    return text if len(text) <= longest else f"{text[: longest - tail - 3]} … {text[-tail:]}"
