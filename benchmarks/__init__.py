"""Measurements, never run by the tests. Each prints the table that docs/performance.md quotes."""
