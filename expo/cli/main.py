"""The verbs, and what every error turns into."""

import signal
import sys
import traceback
from typing import NoReturn

import click

from expo import __version__
from expo.checkpoint.headers import printable
from expo.cli.card import card
from expo.cli.compare import compare
from expo.cli.demo import demo
from expo.cli.diff import diff
from expo.cli.evaluate import evaluate
from expo.cli.extract_lora import extract_lora
from expo.cli.extrapolate import extrapolate
from expo.cli.faults import SYSTEM_FAULTS, in_words
from expo.cli.info import info
from expo.cli.laser import laser
from expo.cli.merge import merge
from expo.cli.output import WRITTEN
from expo.cli.plan import plan
from expo.cli.publish import publish
from expo.cli.spectrum import spectrum
from expo.cli.stopping import RESUMABLE, Stop, last_words
from expo.cli.streams import Unprinted, crashed, guarded
from expo.cli.sweep import sweep
from expo.cli.verify import FOUND_AN_ERROR, verify
from expo.errors import ExpoError, SpecError, VerificationError


@click.group(
    # click would drop what looks like colour: `guarded` shows it
    context_settings={"help_option_names": ["-h", "--help"], "color": True},
    epilog="Exit codes: 0 done · 1 failed or refused · 2 usage or invalid spec · 3 an output does "
    "not verify, or models differ in structure (diff) · 130 interrupted · 143 terminated.",
)
@click.version_option(__version__, prog_name="expo", message="%(prog)s %(version)s")
def cli() -> None:
    """Extrapolate language-model checkpoints (ExPO), at the speed of the disk.

    θ = θ_sft + α·(θ_aligned − θ_sft). α = 1 is the aligned model, α = 1.5 is what the ExPO paper
    and most model cards call 0.5.
    """


for _command in (
    extrapolate,
    merge,
    plan,
    diff,
    verify,
    info,
    spectrum,
    laser,
    extract_lora,
    sweep,
    evaluate,
    compare,
    card,
    publish,
    demo,
):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.excepthook = crashed
    RESUMABLE.clear()
    WRITTEN.clear()
    with guarded():
        code = _run(arguments)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        _check_text(arguments)
        code = cli.main(arguments, prog_name="expo", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        code = _stopped(signal.SIGINT)
    except Stop as stop:
        code = _stopped(stop.number)
    except ExpoError as error:
        code = _failed(error, debug="--debug" in arguments)
    except Unprinted as reason:
        code = _unprinted(reason)
    except SYSTEM_FAULTS as fault:
        code = _refused_by_the_system(fault, debug="--debug" in arguments)
    return code if isinstance(code, int) else 0


def _check_text(arguments: list[str]) -> None:
    """Names that are no text end up in manifests and cards, which are."""
    for word in arguments:
        try:
            is_text = "\0" not in word.encode().decode()
        except UnicodeEncodeError:
            is_text = False
        if not is_text:
            raise SpecError(f"{printable(word)} is not UTF-8 text: rename what it names")


def _stopped(number: int) -> int:
    words, code = last_words(number)
    print(words, file=sys.stderr)
    return code


def _unprinted(reason: Unprinted) -> int:
    where = f"; in place: {', '.join(map(str, WRITTEN))}" if WRITTEN else ""
    print(f"expo: what came out could not be printed ({reason}){where}", file=sys.stderr)
    return 1


def _refused_by_the_system(fault: Exception, *, debug: bool) -> int:
    """Raises what is not the system's doing but a mistake in expo."""
    words = in_words(fault)
    if words is None:
        raise fault
    if debug:
        traceback.print_exception(fault)
    print(f"expo: {words}", file=sys.stderr)
    return 1


def _failed(error: ExpoError, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    for line in str(error).split("\n"):
        print(f"expo: {line}", file=sys.stderr)
    match error:
        case SpecError():
            return 2
        case VerificationError():
            return FOUND_AN_ERROR
    return 1
