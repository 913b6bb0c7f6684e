"""`python -m expo` is `expo`."""

from expo.cli.main import main

main()
