"""Flags that several verbs share: one name and meaning everywhere, handed over in bundles."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from expo.cli.output import Output
from expo.compute.devices import PROCESSOR, device_name
from expo.distribution.share import Share, read_share
from expo.errors import SpecError
from expo.spec.grid import read_values
from expo.spec.request import (
    DTYPES,
    ROUNDINGS,
    Request,
    dtype_name,
    resolve_alpha,
    resolve_alphas,
)
from expo.threads import DEFAULT_THREADS

Decorator = Callable[[Callable], Callable]

_ONLY_OURS = {"dtype", "rounding", "allow_missing"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ByteSize(click.ParamType):
    """`5GB`, `500MB`, `1GiB`, or a plain number of bytes, from a megabyte on."""

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
        if found and not found[2] and nbytes < 10**6:
            self.fail(f"{value} means bytes: say which unit, like {value}GB", param, ctx)
        return nbytes


class DeviceName(click.ParamType):
    """`cpu`, `cuda` or `cuda:1`."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return device_name(str(value))
        except SpecError as error:
            self.fail(str(error), param, ctx)


class Dtype(click.Choice):
    """One of the dtypes; `bf16` and `torch.bfloat16` say the same as `bfloat16`."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(dtype_name(str(value)), param, ctx)


@dataclass(frozen=True)
class Overrides:
    """Flags that change a request, None where not given."""

    dtype: str | None
    rounding: str | None
    seed: int | None
    allow_missing: str | None
    include: tuple[str, ...]
    max_shard_bytes: int | None
    stream_inputs: bool = False

    def apply(self, request: Request) -> Request:
        given = {n: v for n, v in vars(self).items() if v not in (None, ()) and v is not False}
        if request.foreign is not None and (wrong := given.keys() & _ONLY_OURS):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(wrong))
            raise SpecError(f"{flags}: not with mergekit's engine ({request.foreign.reasons[0]})")
        return replace(request, **given)


@dataclass(frozen=True)
class Amounts:
    """How far to go: one α, or several, each with an output of its own; or neither."""

    alpha: float | None
    alphas: tuple[float, ...] = ()


@dataclass(frozen=True)
class RunOptions:
    """Flags that say how to run."""

    dry_run: bool = False
    overwrite: bool = False
    hash_inputs: bool = False
    verify: bool = True
    threads: int = DEFAULT_THREADS
    device: str | None = None
    join: bool = False
    share: Share | None = None
    engine: str | None = None
    address: str | None = None

    @property
    def shared_by(self) -> str | None:
        """The flag by which other processes make the same output; None where this one does alone."""
        flags = {"--join": self.join, "--worker": self.share, "--engine": self.engine}
        return next((flag for flag, given in flags.items() if given), None)

    def check_alone(self, flag: str, why: str) -> None:
        """Raises SpecError: the work is shared, which does not go with another flag."""
        if self.shared_by:
            raise SpecError(f"{self.shared_by}: not with {flag}, {why}")


@dataclass(frozen=True)
class PublishOptions:
    """Flags that say where and how to publish."""

    public: bool
    revision: str
    create_pr: bool
    licence: str | None
    name_ok: bool
    receipt: Path | None
    push: bool = False


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: by a preset or the model's own settings, under what is given."""

    preset: str | None
    given: dict[str, float]


def _bundle(name: str, make: Callable[..., object], options: dict[str, Decorator]) -> Decorator:
    """Add options to a command, which gets what `make` makes of them as its argument `name`."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def bundled(**values: object) -> object:
            values[name] = make(**{key: values.pop(key) for key in options})
            return command(**values)

        decorated: Callable = bundled
        for option in reversed(options.values()):
            decorated = option(decorated)
        return decorated

    return decorate


def _alphas(alphas: str | None, *, interpolate: bool) -> tuple[float, ...]:
    if alphas is None:
        if interpolate:
            raise SpecError("--interpolate: goes with --alphas; a spec says interpolate: true")
        return ()
    return resolve_alphas(read_values(alphas, what="--alphas"), interpolate=interpolate)


def _amounts(
    alpha: float | None, paper_alpha: float | None, alphas: str | None, *, interpolate: bool
) -> Amounts:
    if alphas is not None and (alpha is not None or paper_alpha is not None):
        raise SpecError("give --alpha, --paper-alpha or --alphas, one of them")
    if alphas is not None:
        return Amounts(None, _alphas(alphas, interpolate=interpolate))
    return Amounts(resolve_alpha(alpha, paper_alpha, interpolate=interpolate))


def _talk(*, as_json: bool, quiet: bool, verbose: bool, debug: bool) -> Output:
    return Output(
        json=as_json, quiet=quiet, verbose=verbose
    )  # the entry point looks for --debug itself


def _running(
    *,
    no_verify: bool,
    join: bool,
    worker: str | None,
    engine: str | None,
    address: str | None,
    **flags: bool | int | str | None,
) -> RunOptions:
    if sum(map(bool, (join, worker, engine))) > 1:
        raise SpecError(
            "give --join, --worker or --engine, one of them: the work is shared by locks, beforehand, or by Ray"
        )
    if address is not None and engine is None:
        raise SpecError("--address: goes with --engine ray")
    share = None if worker is None else read_share(worker)
    options = RunOptions(verify=not no_verify, **flags)  # pyright: ignore[reportArgumentType]
    return replace(options, join=join, share=share, engine=engine, address=address)


_ALPHA: dict[str, Decorator] = {
    "alpha": click.option("--alpha", type=float, help="0 is SFT, 1 is aligned, 1.5 extrapolates."),
    "paper_alpha": click.option(
        "--paper-alpha", type=float, help="The paper's and the cards' a = alpha − 1."
    ),
}
_ALPHAS: dict[str, Decorator] = {
    "alphas": click.option(
        "--alphas",
        metavar="GRID",
        help="Several outputs from one read: 1.2,1.3,1.5 or 1.1:1.5:0.1 make OUT-alpha-1.2 and so on.",
    )
}
_INTERPOLATE: dict[str, Decorator] = {
    "interpolate": click.option("--interpolate", is_flag=True, help="Allow 0 < alpha < 1.")
}

amount = _bundle(
    "alpha",
    lambda alpha, paper_alpha, interpolate: resolve_alpha(
        alpha, paper_alpha, interpolate=interpolate
    ),
    _ALPHA | _INTERPOLATE,
)
amounts = _bundle("amounts", _amounts, _ALPHA | _ALPHAS | _INTERPOLATE)
alphas = _bundle("alphas", _alphas, _ALPHAS | _INTERPOLATE)

forcing = click.option(
    "--force",
    is_flag=True,
    help="Go on where a gate refuses: quantized inputs whose noise outweighs the change, low-rank cuts that are not at "
    "the noise of rounding.",
)

streaming = click.option(
    "--stream-inputs",
    is_flag=True,
    help="Read weights on the Hub by range as they are needed, without a download.",
)

overrides = _bundle(
    "overrides",
    Overrides,
    {
        "dtype": click.option(
            "--dtype",
            type=Dtype(DTYPES),
            help="Of the output's floats. [default: as the aligned model's, tensor by tensor]",
        ),
        "rounding": click.option(
            "--rounding", type=click.Choice(ROUNDINGS), help="To the dtype. [default: nearest]"
        ),
        "seed": click.option("--seed", type=int, help="Of the stochastic rounding. [default: 0]"),
        "allow_missing": click.option(
            "--allow-missing",
            metavar="REGEX",
            help="Copy matching tensors that only aligned has, drop those that only SFT has.",
        ),
        "include": click.option(
            "--include",
            multiple=True,
            metavar="GLOB",
            help="Also copy these files of the aligned model.",
        ),
        "max_shard_bytes": click.option(
            "--max-shard-size",
            "max_shard_bytes",
            type=ByteSize(),
            help="Re-shard, e.g. 5GB. [default: as aligned]",
        ),
        "stream_inputs": streaming,
    },
)

_WHERE = "Where it is computed: cpu, cuda or cuda:N."
measured = click.option(
    "--device",
    type=DeviceName(),
    help="Also measure what bounds the run on cpu, cuda or cuda:N: disk, bus or compute. Takes about a second.",
)
device = click.option(
    "--device", type=DeviceName(), default=PROCESSOR, show_default=True, help=_WHERE
)
model_device = click.option("--device", help="Like cuda:0. [default: cuda where there is one]")

running = _bundle(
    "options",
    _running,
    {
        "dry_run": click.option("--dry-run", is_flag=True, help="Print the plan, write nothing."),
        "overwrite": click.option(
            "--overwrite", is_flag=True, help="Replace the model in OUT, once all is done."
        ),
        "no_verify": click.option(
            "--no-verify", is_flag=True, help="Skip the verification of the output."
        ),
        "hash_inputs": click.option(
            "--hash-inputs", is_flag=True, help="Identify inputs by SHA-256 of the whole files."
        ),
        "threads": click.option(
            "--threads",
            type=click.IntRange(1, 64),
            default=DEFAULT_THREADS,
            show_default=True,
            help="Workers.",
        ),
        "device": click.option("--device", type=DeviceName(), help=f"{_WHERE} [default: cpu]"),
        "join": click.option(
            "--join",
            is_flag=True,
            help="Share the work with every process that runs this command, here or on other machines that see OUT.",
        ),
        "worker": click.option(
            "--worker",
            metavar="I/N",
            help="As --join on a disk without locks: do part I of N (0/8 … 7/8), or what SLURM, torchrun or Kubernetes "
            "say (auto, auto/N).",
        ),
        "engine": click.option(
            "--engine",
            type=click.Choice(["ray"]),
            help="Compute on the nodes of a Ray cluster, which all see the models and OUT.",
        ),
        "address": click.option(
            "--address",
            metavar="ADDRESS",
            help="Of that cluster: auto, or HOST:PORT. [default: RAY_ADDRESS, else one is started here]",
        ),
    },
)


def _to_the_hub(when: str = "") -> dict[str, Decorator]:
    """The flags of a publication, which another verb's help introduces with `when` they are taken."""

    def flag(name: str, said: str, **how: Any) -> Decorator:
        text = f"{when}{said[0].lower()}{said[1:]}" if when else said
        return click.option(*name.split(), help=text, **how)

    return {
        "public": flag("--public", "Let everybody see a new repository.", is_flag=True),
        "revision": flag("--revision", "Made if need be.", metavar="BRANCH", default="main", show_default=True),
        "create_pr": flag("--create-pr", "Open a pull request instead of a commit to main.", is_flag=True),
        "licence": flag("--license licence", "Of OUT, where its parents do not tell.", metavar="ID"),
        "name_ok": flag("--name-ok", "Leave out the name prefix that a licence wants.", is_flag=True),
        "receipt": flag("--receipt", "Write what was published, as JSON, to this file.",
                        type=click.Path(path_type=Path), metavar="FILE"),
    }  # fmt: skip


publishing = _bundle("to", PublishOptions, _to_the_hub())


pushing = _bundle(
    "to",
    PublishOptions,
    {
        "push": click.option(
            "--push",
            is_flag=True,
            help="OUT is ORG/NAME on the Hub (hf://ORG/NAME says the same): send shards as they finish, then commit. "
            "Works in ./.ORG--NAME.expo-staging, two shards large at most.",
        )
    }
    | _to_the_hub("With --push: "),
)

decoding = _bundle(
    "decoding",
    lambda preset, **given: Decoding(preset, {k: v for k, v in given.items() if v is not None}),
    {
        "preset": click.option(
            "--preset", help="expo-paper: as the paper sampled. [default: the model's own settings]"
        ),
        "temperature": click.option(
            "--temperature", type=float, help="0 is greedy. [default: the model's own]"
        ),
        "top_k": click.option("--top-k", type=int, help="0 leaves every token."),
        "top_p": click.option("--top-p", type=float, help="1 leaves every token."),
        "min_p": click.option("--min-p", type=float, help="0 leaves every token."),
        "presence_penalty": click.option("--presence-penalty", type=float, help="As OpenAI's."),
        "frequency_penalty": click.option("--frequency-penalty", type=float, help="As OpenAI's."),
        "max_new_tokens": click.option("--max-new-tokens", type=int, help="Of one answer."),
    },
)
strictness = click.option(
    "--strict", is_flag=True, help="Refuse keys that are not known, also in mergekit's specs."
)

talk = _bundle(
    "output",
    _talk,
    {
        "as_json": click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        "quiet": click.option("-q", "--quiet", is_flag=True, help="Print data only, no talk."),
        "verbose": click.option("-v", "--verbose", is_flag=True, help="Print all that is known."),
        "debug": click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    },
)
