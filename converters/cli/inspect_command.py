"""The command `peanut-inspect`: its options, as objects."""

from pathlib import Path
from typing import Annotated

import typer

from converters.api.options import Sources
from converters.cli.importing import imports_that_stay
from converters.cli.options import LAYOUTS, AdapterRevision, Json, Layout, Revision, Scaling, Token, Version
from converters.errors import OptionError

HELP = f"""Show what an adapter is and, with a base, how strongly it acts where; or verify an output of peanut-merge.

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
        str, typer.Argument(help="Folder, weights or Hub id of a trained adapter; with --verify, an output folder.")
    ],
    base: Annotated[str | None, typer.Option("--base", help="The base it was trained on: adds the norms.")] = None,
    layout: Layout = None,
    scaling: Scaling = None,
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    token: Token = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Plot where the adapter acts (png, svg, pdf).")] = None,
    record_base: Annotated[
        bool, typer.Option("--record-base", help="Write the base's fingerprint beside the adapter.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare an output folder with its manifest.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Recompute a merged checkpoint from --base and --adapter.")
    ] = False,
    merged_from: Annotated[
        list[str] | None, typer.Option("--adapter", help="What it was merged with, for --verify --full.")
    ] = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Show what an adapter is, or verify an output; see `HELP`."""
    if full and not (verify and base is not None and merged_from):
        raise OptionError("--full needs --verify, --base and --adapter: it recomputes a merged folder from them")
    with imports_that_stay():
        from converters.cli import inspecting

    sources = Sources(
        base, merged_from or (), revision, adapter_revision, token, layout, scaling, names_have_weights=True
    )
    if verify:
        inspecting.verify(Path(adapter), sources if full else None, as_json)
    else:
        inspecting.describe(adapter, sources, plot=plot, record=record_base, as_json=as_json)
