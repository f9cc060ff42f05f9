"""What the options of `peanut-merge` and `peanut-inspect` have in common."""

from typing import Annotated

import typer

from converters._version import __version__
from converters.adapters.layouts.names import LAYOUT_SUMMARIES

# click keeps the line breaks of a paragraph that begins with \b
LAYOUTS = "Layouts, seen by themselves where possible (else --layout):\n\n\b\n" + "\n".join(
    f"  {name:20} {summary}" for name, summary in LAYOUT_SUMMARIES.items()
)

Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the base on the Hub.")]
AdapterRevision = Annotated[
    str | None, typer.Option("--adapter-revision", help="Branch, tag or commit of an adapter on the Hub.")
]
Layout = Annotated[
    str | None, typer.Option("--layout", help="Layout of the adapter, where it cannot be seen: see below.")
]
Scaling = Annotated[
    float | None, typer.Option("--scaling", help="Scale s of f, where the adapter does not store it.")
]
Token = Annotated[str | None, typer.Option("--token", help="Hub token; HF_TOKEN works as well.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peanut-serve {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]
