"""`python -m expo` is `expo`."""

from expo.cli.entry import run

run()
