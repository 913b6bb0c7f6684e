"""Pure tensor functions: the formula and its paper are the docstring. No I/O, no configuration."""
