"""The program: signals are minded before anything is imported, and until nothing is left."""

import atexit
import gc
import sys

from expo.cli.stopping import finish_with, ignore_signals, mind_signals


def run() -> None:
    """Run the command line as a process of its own, and exit with its code."""
    atexit.register(ignore_signals)  # what is registered first comes last
    mind_signals()
    gc.set_threshold(10_000, 20, 100)  # headers are a million objects, and none of them is garbage
    try:
        from expo.cli.main import main
    except (MemoryError, OSError, ImportError) as error:
        said = str(error) or "not enough memory"
        cure = "raise the limits (ulimit -v -n), or install expo again"
        sys.exit(f"expo: the program cannot be loaded ({said}): {cure}")
    try:
        main()
    except SystemExit as end:
        finish_with(end.code if isinstance(end.code, int) else 1)
        raise
