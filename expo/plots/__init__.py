"""Plots. matplotlib comes with the extra `plot` and is imported only here."""
