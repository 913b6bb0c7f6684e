"""`expo extrapolate`: the main job in one line."""

from pathlib import Path

import click

from expo.cli import options as flags
from expo.cli.merging import run_merge
from expo.cli.output import Output, to_json
from expo.cli.pushing import is_push, run_push


@click.command(
    epilog="""\b
Examples:
  expo extrapolate openchat/openchat-3.5-0106 Nexusflow/Starling-LM-7B-beta out --alpha 1.5
  expo extrapolate ./sft ./aligned ./out --paper-alpha 0.3
  expo extrapolate ./sft ./sft+./dpo-adapter ./out --alpha 1.3 --rounding stochastic
  expo extrapolate ./sft ./aligned ./out --alphas 1.2,1.3,1.5
  expo extrapolate a.safetensors b.safetensors out.safetensors --alpha 1.3
  expo extrapolate ./sft ./sft+./dpo-adapter ./adapter --alpha 1.3 --as-adapter
  expo extrapolate org/sft org/aligned org/name --alpha 1.5 --push --stream-inputs
"""
)
@click.argument("sft")
@click.argument("aligned")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--as-adapter",
    is_flag=True,
    help="Of BASE and BASE+ADAPTER write the adapter, its scale times α: megabytes, and exact.",
)
@click.option("--print-spec", is_flag=True, help="Print the YAML that does the same, and exit.")
@flags.forcing
@flags.amounts
@flags.overrides
@flags.running
@flags.pushing
@flags.talk
def extrapolate(
    sft: str,
    aligned: str,
    out: Path,
    as_adapter: bool,
    print_spec: bool,
    force: bool,
    amounts: flags.Amounts,
    overrides: flags.Overrides,
    options: flags.RunOptions,
    to: flags.PublishOptions,
    output: Output,
) -> None:
    """Write θ_sft + α·(θ_aligned − θ_sft) to the directory OUT, or to the one file OUT.safetensors.

    SFT and ALIGNED are directories, safetensors files, Hub ids (org/name, org/name@revision), prefixes of object stores
    (s3://bucket/prefix, gs://, az://, https://), or model+adapter for a LoRA adapter. An interrupted run resumes when the same command is run again.
    With --push OUT is a repository on the Hub, and no more than two shards of it are on this disk at a time.
    """
    from expo.errors import SpecError
    from expo.spec.request import make_request

    alpha, alphas = amounts.alpha, amounts.alphas
    if alphas and (as_adapter or print_spec):
        flag = "--as-adapter" if as_adapter else "--print-spec"
        raise SpecError(f"--alphas: not with {flag}, which goes with one --alpha")
    if alpha is None and not alphas and (print_spec or not options.dry_run):
        raise SpecError("give --alpha or --paper-alpha (= alpha − 1); neither has a default")
    pushes = is_push(out, to, alphas)
    if as_adapter:
        if pushes:
            raise SpecError(
                "--push: not with --as-adapter, which writes megabytes: expo publish them"
            )
        if force:
            raise SpecError("--force: not with --as-adapter, which has no gate")
        _adapter((sft, aligned, out), alpha, print_spec, overrides, options, output)
        return
    request = make_request(sft, aligned, alpha=alpha, interpolate=True)
    request = overrides.apply(request.forced() if force else request)
    if print_spec:
        from expo.spec.resolved import resolved, to_yaml

        spec = resolved(request)
        output.data(to_json(spec) if output.json else to_yaml(spec).rstrip())
        return
    if pushes:
        run_push(request, out, to, options, output)
    else:
        run_merge(request, out, options, output, alphas=alphas)


def _adapter(
    models: tuple[str, str, Path],
    alpha: float | None,
    print_spec: bool,
    overrides: flags.Overrides,
    options: flags.RunOptions,
    output: Output,
) -> None:
    from expo.cli.extract_lora import report_adapter
    from expo.errors import SpecError
    from expo.verbs.scale_adapter import extrapolate_adapter

    others = [name for name, value in vars(overrides).items() if value not in (None, (), False)]
    others += [name for name in ("dry_run", "hash_inputs", "device") if getattr(options, name)]
    others += ["print_spec"] if print_spec else []
    others += [] if options.verify else ["no_verify"]
    options.check_alone("--as-adapter", "which writes megabytes")
    if others:
        flag = others[0].replace("_", "-").replace("max-shard-bytes", "max-shard-size")
        raise SpecError(f"--{flag}: not with --as-adapter, which copies the adapter's own matrices")
    if alpha is None:
        raise SpecError("give --alpha or --paper-alpha (= alpha − 1); neither has a default")
    base, adapted, out = models
    result = extrapolate_adapter(
        base, adapted, out, alpha=alpha, interpolate=True, overwrite=options.overwrite
    )
    report_adapter(
        result, lambda: f"the adapter of {adapted}, its scale times {alpha:.12g}: exact", output
    )
