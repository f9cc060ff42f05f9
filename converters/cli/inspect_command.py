"""The command `peanut-inspect`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.cli.options import LAYOUTS, AdapterRevision, Json, Layout, Revision, Scaling, Token, Version
from converters.errors import OptionError

if TYPE_CHECKING:
    from converters.adapters.adapter import Weighted
    from converters.models.checkpoint import Checkpoint

HELP = f"""Show what an adapter is; with a base, how strongly it acts where. Or check a merged folder again.

Examples:

  peanut-inspect ./gsm8k

  peanut-inspect ./gsm8k --base llama2-7b --plot gsm8k.png

  peanut-inspect ./gsm8k --base llama2-7b --record-base

  peanut-inspect ./llama2-7b-gsm8k --verify

  peanut-inspect ./pets-onnx --verify

  peanut-inspect ./llama2-7b-gsm8k --verify --full --base llama2-7b --adapter ./gsm8k

{LAYOUTS}
"""


def run_command(
    adapter: Annotated[
        str, typer.Argument(help="Folder, weights or Hub id of a trained adapter; with --verify, a merged folder.")
    ],
    base: Annotated[str | None, typer.Option("--base", help="The base it was trained on: adds the norms.")] = None,
    layout: Layout = None,
    scaling: Scaling = None,
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    token: Token = None,
    plot: Annotated[Path | None, typer.Option(help="Draw where the adapter acts (png, svg, pdf).")] = None,
    record_base: Annotated[
        bool, typer.Option("--record-base", help="Write the base's fingerprint beside the adapter.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check a merged folder against its manifest.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Recompute all of it, from --base and --adapter.")] = False,
    merged_from: Annotated[
        list[str] | None, typer.Option("--adapter", help="What it was merged with, for --verify --full.")
    ] = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Show what an adapter is, or check a merged folder; see `HELP`."""
    from converters.adapters import facts as description
    from converters.adapters.adapter import Weighted
    from converters.adapters.loading import load_adapter
    from converters.adapters.opening import open_weighted
    from converters.api.merging import open_base
    from converters.cli import console, console_adapters
    from converters.errors import MissingScalingError
    from converters.inspection import norms as inspection
    from converters.inspection.plot import check_plot, plot_norms

    if full and not (verify and base is not None and merged_from):
        raise OptionError("--full needs --verify, --base and --adapter: it recomputes a merged folder from them")
    if verify:
        inputs = None
        if full and base is not None:
            several = open_weighted(
                merged_from or [], layout=layout, scaling=scaling, revision=adapter_revision, token=token
            )
            inputs = open_base(base, several, revision=revision, token=token)[0], several
        _verify(Path(adapter), inputs, as_json)
        return
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
    console_adapters.print_facts(facts)
    console_adapters.print_shapes(shapes)
    if norms:
        console_adapters.print_norms(norms)


def _verify(output: Path, inputs: "tuple[Checkpoint, Sequence[Weighted]] | None", as_json: bool) -> None:
    """Check a merged folder; with a base and adapters, recompute it."""
    from converters.cli import console
    from converters.outputs.checkpoint import recheck

    files = recheck.check_files(output)
    if files is not None:
        if inputs is not None:
            raise OptionError("--full recomputes merged checkpoints; an ONNX export is checked when it is written")
        console.print_files(output, files, as_json)
        return
    found = recheck.open_merged(output)
    size = sum(info.nbytes for info in found.tensors.values())
    verification = None
    with console.Progress(size * (1 if inputs is None else 2), "checking", as_bytes=True) as advance:
        recheck.check_hashes(output, advance)
        if inputs is not None:
            verification = recheck.check_against(output, recheck.plan_again(output, *inputs), advance)
    console.print_check(output, len(found.tensors), verification, as_json)
