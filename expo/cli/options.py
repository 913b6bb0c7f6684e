"""Flags that several verbs share, under the same name and meaning everywhere."""

import re
from collections.abc import Callable
from typing import TypeVar

import click

from expo.planning.chunks import DEFAULT_THREADS
from expo.spec.request import DTYPES, ROUNDINGS

F = TypeVar("F", bound=Callable)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ByteSize(click.ParamType):
    """`5GB`, `500MB`, `1GiB`, or a plain number of bytes."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(value))
        try:
            nbytes = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
        except (KeyError, ValueError):
            nbytes = 0
        if nbytes <= 0:
            self.fail(f"{value} is not a size like 5GB, 500MB or 1GiB", param, ctx)
        return nbytes


def talk(command: F) -> F:
    """`--json`, `-q`, `--debug`."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("-q", "--quiet", is_flag=True, help="Print data only, no talk or progress."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        command = option(command)
    return command


def amount(command: F) -> F:
    """`--alpha`, `--paper-alpha`, `--interpolate`."""
    for option in (
        click.option("--interpolate", is_flag=True, help="Allow 0 < alpha < 1."),
        click.option("--paper-alpha", type=float, help="The paper's and the cards' a = alpha − 1."),
        click.option("--alpha", type=float, help="0 is SFT, 1 is aligned, 1.5 extrapolates."),
    ):
        command = option(command)
    return command


def numbers(command: F) -> F:
    """`--dtype`, `--rounding`, `--seed`."""
    for option in (
        click.option("--seed", type=int, help="Of the stochastic rounding. [default: 0]"),
        click.option(
            "--rounding", type=click.Choice(ROUNDINGS), help="To the dtype. [default: nearest]"
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Of the output's floats. [default: as the aligned model's, tensor by tensor]",
        ),
    ):
        command = option(command)
    return command


def matching(command: F) -> F:
    """`--allow-missing`, `--include`, `--max-shard-size`."""
    for option in (
        click.option(
            "--max-shard-size", type=ByteSize(), help="Re-shard, e.g. 5GB. [default: as aligned]"
        ),
        click.option(
            "--include",
            multiple=True,
            metavar="GLOB",
            help="Also copy these files of the aligned model.",
        ),
        click.option(
            "--allow-missing",
            metavar="REGEX",
            help="Copy matching tensors that only aligned has, drop those that only SFT has.",
        ),
    ):
        command = option(command)
    return command


def running(command: F) -> F:
    """`--dry-run`, `--overwrite`, `--no-verify`, `--hash-inputs`, `--threads`."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(1, 64),
            default=DEFAULT_THREADS,
            show_default=True,
            help="Workers.",
        ),
        click.option(
            "--hash-inputs", is_flag=True, help="Identify inputs by SHA-256 of the whole files."
        ),
        click.option("--no-verify", is_flag=True, help="Skip the verification of the output."),
        click.option("--overwrite", is_flag=True, help="Replace what OUT holds, once all is done."),
        click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    ):
        command = option(command)
    return command
