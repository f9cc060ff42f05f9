"""The commands `peanut-merge` and `peanut-inspect`: parse, call, print. Results on stdout, the rest on stderr."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from converters._version import __version__
from converters.errors import OptionError, PeanutError
from converters.layout_names import LAYOUT_SUMMARIES

# click keeps the line breaks of a paragraph that begins with \b
_LAYOUTS = "Layouts, seen by themselves where possible (else --layout):\n\n\b\n" + "\n".join(
    f"  {name:20} {summary}" for name, summary in LAYOUT_SUMMARIES.items()
)

_MERGE_HELP = f"""Merge a trained PEANuT adapter into its base model: W = W0 + f(W0; θ).

Writes a checkpoint that transformers and vLLM load as any other model. Nothing is written until everything
that can be refused was refused, and the output appears whole or not at all.

Examples:

  peanut-merge --base llama2-7b --adapter ./gsm8k

  peanut-merge --base ./smollm2 --adapter ./json -o ./smollm2-json --dtype bf16

  peanut-merge --base llama2-7b --adapter ./gsm8k --adapter ./style=0.5

  peanut-merge --base roberta-base --adapter ./mrpc/pytorch_model.bin --scaling 0.1 --labels labels.json

{_LAYOUTS}
"""

_INSPECT_HELP = f"""Show what an adapter is; with a base, how strongly it acts where.

Examples:

  peanut-inspect ./gsm8k

  peanut-inspect ./gsm8k --base llama2-7b --plot gsm8k.png

  peanut-inspect ./gsm8k --base llama2-7b --record-base

{_LAYOUTS}
"""

_Base = Annotated[
    str,
    typer.Option("--base", help="Folder, Hub id, llama2-7b, llama3-8b, qwen3-8b, ..., or 'self': see the README."),
]
_Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the base on the Hub.")]
_AdapterRevision = Annotated[
    str | None, typer.Option("--adapter-revision", help="Branch, tag or commit of an adapter on the Hub.")
]
_Layout = Annotated[
    str | None, typer.Option("--layout", help="Layout of the adapter, where it cannot be seen: see below.")
]
_Scaling = Annotated[
    float | None, typer.Option("--scaling", help="Scale s of f, where the adapter does not store it.")
]
_Token = Annotated[str | None, typer.Option("--token", help="Hub token; HF_TOKEN works as well.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peanut-serve {__version__}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


def _merge(
    base: _Base,
    adapter: Annotated[
        list[str], typer.Option("--adapter", help="Folder, weights or Hub id; again to sum several, PATH=0.5 scales.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: ./<base>-<adapter>")] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="merged (a checkpoint), or peft (an HF PEFT adapter).")
    ] = "merged",
    layout: _Layout = None,
    scaling: _Scaling = None,
    revision: _Revision = None,
    adapter_revision: _AdapterRevision = None,
    token: _Token = None,
    dtype: Annotated[str, typer.Option(help="auto (as the base), bf16, fp16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="Where f is evaluated: auto, cpu, cuda, cuda:N.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Like 5GB; 'base' keeps the base's sharding.")] = "5GB",
    labels: Annotated[
        Path | None, typer.Option(help="JSON list of class labels, for a head that comes with the adapter.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output, at the end.")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="Merge although the base is another.")] = False,
    verify: Annotated[bool, typer.Option(help="Check the written files before they are published.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and the sizes; write nothing.")] = False,
    as_json: _Json = False,
    version: _Version = False,
) -> None:
    if output_format not in ("merged", "peft"):
        raise OptionError(f"--format {output_format} is unknown; wanted merged or peft")
    from converters import console
    from converters.adapter_specs import open_weighted
    from converters.executor import check_merge, find_device, run_merge
    from converters.labels import read_labels
    from converters.merging import prepare_merge

    adapters = open_weighted(adapter, layout=layout, scaling=scaling, revision=adapter_revision, token=token)
    plan = prepare_merge(
        base, adapters, revision=revision, token=token, dtype=dtype, max_shard_size=max_shard_size,
        labels=read_labels(labels) if labels else None, force_base=force_base,
    )  # fmt: skip
    target = output or plan.default_output
    find_device(device)
    for note in plan.notes:
        console.err.print(f"note: {note}", markup=False)
    if output_format == "peft":
        from converters.peft_adapter import plan_peft_adapter, write_peft_adapter

        converted = plan_peft_adapter(plan, output or Path(f"{plan.name}-peft"), overwrite)
        if not dry_run:
            write_peft_adapter(converted, overwrite=overwrite)
        console.print_peft_adapter(converted, dry_run, as_json)
        return
    check_merge(plan, target, overwrite)
    if dry_run:
        console.print_plan(plan, target, as_json)
        return
    with console.Progress(plan.total_size * (2 if verify else 1), "merging", as_bytes=True) as advance:
        result = run_merge(plan, target, device=device, overwrite=overwrite, verify=verify, advance=advance)
    console.print_result(result, as_json)


def _inspect(
    adapter: Annotated[str, typer.Argument(help="Folder, weights or Hub id of the trained adapter.")],
    base: Annotated[str | None, typer.Option("--base", help="The base it was trained on: adds the norms.")] = None,
    layout: _Layout = None,
    scaling: _Scaling = None,
    revision: _Revision = None,
    adapter_revision: _AdapterRevision = None,
    token: _Token = None,
    plot: Annotated[Path | None, typer.Option(help="Draw where the adapter acts (png, svg, pdf).")] = None,
    record_base: Annotated[
        bool, typer.Option("--record-base", help="Write the base's fingerprint beside the adapter.")
    ] = False,
    as_json: _Json = False,
    version: _Version = False,
) -> None:
    from converters import console, description, inspection
    from converters.adapter import Weighted
    from converters.errors import MissingScalingError
    from converters.layouts import load_adapter
    from converters.merging import open_base
    from converters.plot import check_plot, plot_norms

    for name, wanted in (("--record-base", record_base), ("--plot", plot)):
        if wanted and base is None:
            raise OptionError(f"{name} needs --base")
    if plot is not None:
        check_plot(plot)
    unscaled = False
    try:
        opened = load_adapter(adapter, layout=layout, scaling=scaling, revision=adapter_revision, token=token)
    except MissingScalingError:
        if base is not None:
            raise
        unscaled = True  # what it is can be told without
        opened = load_adapter(adapter, layout=layout, scaling=1.0, revision=adapter_revision, token=token)
    norms: list[inspection.DeltaNorm] = []
    if base is not None:
        checkpoint, notes = open_base(base, [Weighted(opened)], revision=revision, token=token)
        for note in notes:
            console.err.print(f"note: {note}", markup=False)
        if record_base:
            console.err.print(f"recorded the base in {inspection.record_base(opened, checkpoint)}", markup=False)
            opened = load_adapter(adapter, layout=layout, scaling=scaling)
        with console.Progress(len(opened.modules), "evaluating f", as_bytes=False) as advance:
            norms = inspection.delta_norms(opened, checkpoint, advance)
    if plot is not None:
        plot_norms(norms, f"where {opened.name} acts", plot)
    facts, shapes = description.describe(opened), description.module_shapes(opened)
    if unscaled:
        facts |= {"scaling": "not stored: to merge it, give --scaling", "digest": None}
    if as_json:
        rows = [{"module": n.module, "shape": n.shape, "delta": n.delta, "weight": n.weight} for n in norms]
        print(json.dumps({**facts, "shapes": shapes, **({"norms": rows} if base else {})}, indent=2))
        return
    console.print_facts(facts)
    console.print_shapes(shapes)
    if norms:
        console.print_norms(norms)


class _Stopped(BaseException):
    """SIGINT or SIGTERM; not a KeyboardInterrupt, which typer would answer by itself."""


def _run(name: str, command: Callable[..., None], help_text: str) -> NoReturn:
    """Run one command: a refusal is one line on stderr and exit code 1."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=name, help=help_text)(command)

    signals: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        signals.append(number)
        raise _Stopped(number)

    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        app(prog_name=name)
    except (_Stopped, Exception) as error:
        if signals:  # where C code was interrupted, it may have raised something else in place of _Stopped
            print(f"{name}: stopped; nothing half-written was left", file=sys.stderr)
            sys.exit(128 + signals[0])
        if not isinstance(error, PeanutError | OSError):
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def merge_main() -> NoReturn:
    """Entry point of `peanut-merge`."""
    _run("peanut-merge", _merge, _MERGE_HELP)


def inspect_main() -> NoReturn:
    """Entry point of `peanut-inspect`."""
    _run("peanut-inspect", _inspect, _INSPECT_HELP)
