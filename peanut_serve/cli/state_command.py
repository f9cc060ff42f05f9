"""The command `peanut-serve state`: names, versions and pins of a server as one file, and whether they are whole."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from converters import open_checkpoint
from converters.cli import console
from converters.cli.flags import in_flags
from converters.cli.options import Json
from converters.errors import OptionError, PeanutError
from peanut_serve.settings.environment import STATE
from peanut_serve.settings.server import state_of
from peanut_serve.variants.backup.archive import Contents
from peanut_serve.variants.backup.checking import StateReport, check_archive, check_state
from peanut_serve.variants.backup.exporting import export_state
from peanut_serve.variants.backup.importing import import_state
from peanut_serve.variants.state_folder import shown_base

HELP = """Export, import and check what survives a restart of `peanut-serve`: names, versions, pins, and copies of θ.

The folder is that of --state, or the default one of --base. A running server may be exported and checked; for an
import it has to be stopped. Merged folders are not in the state, and neither are the caches.

Examples:

  peanut-serve state check --state ./state --adapters ./tasks

  peanut-serve state export --state ./state -o state.tar

  peanut-serve state import state.tar --state ./new-state
"""

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help=HELP
)
_State = Annotated[Path | None, typer.Option("--state", envvar=STATE, help="State folder of the server.")]
_Base = Annotated[str | None, typer.Option("--base", help="The base as given to the server, without --state.")]
_Archive = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="File that `export` wrote.")]


@app.command("export", help="Write the state to one file; its owner alone may read it.")
def _export(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    state: _State = None,
    base: _Base = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file if it exists.")] = False,
) -> None:
    contents = export_state(_folder(state, base), output, overwrite)
    size = console.size_text(contents.nbytes)
    print(f"wrote {output}: {_counted(contents)}, {size}, base {shown_base(contents.base)}")


@app.command("import", help="Make an exported state that of a folder; if that fails, the folder keeps its own.")
def _import(
    archive: _Archive,
    state: _State = None,
    base: _Base = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the records that are there; they are exported first.")
    ] = False,
) -> None:
    folder = _folder(state, base)
    contents, kept = import_state(archive, folder, replace)
    if kept is not None:
        print(f"the earlier state is in {kept}")
    print(f"imported {_counted(contents)} into {folder}; it is used from the next start")


@app.command("check", help="Check the state, or an archive; exit code 1 if something is damaged or would be lost.")
def _check(
    archive: Annotated[Path | None, typer.Argument(metavar="[ARCHIVE]", help="File that `export` wrote.")] = None,
    state: _State = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Folder of the base that will be served; without --state, also where."),
    ] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapters", help="Where the variants are looked up. Can be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    if archive is not None:
        _, report = check_archive(archive)
    else:
        is_folder = base is not None and Path(base).expanduser().is_dir()
        fingerprint = open_checkpoint(Path(str(base)).expanduser()).fingerprint if is_folder else None
        report = check_state(_folder(state, base), fingerprint, adapters or ())
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _show(report)
    if report.problems:
        raise typer.Exit(1)


def _show(report: StateReport) -> None:
    used = ", in use by a server" if report.in_use else ""
    console.out.print(f"schema {report.schema_version}, base {shown_base(report.base)}{used}", markup=False)
    for name, digests in report.versions.items():
        marks = [digest[:12] + ("" if digest in report.usable else " (no θ)") for digest in digests]
        console.out.print(f"{name}: {', '.join(marks) or 'no version yet'}", markup=False)
    console.print_notes(report.notes)
    for problem in report.problems:
        console.err.print(f"problem: {problem}", markup=False)
    print("the state is damaged or incomplete" if report.problems else "the state is whole")


def _counted(contents: Contents) -> str:
    count = len(contents.thetas)
    return f"{count} version{'s' * (count != 1)}"


def _folder(state: Path | None, base: str | None) -> Path:
    if state is None and base is None:
        raise OptionError("give --state, or the --base of a server without --state")
    return state.expanduser().resolve() if state is not None else state_of(str(base))


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve state` with these arguments: an error is one line on stderr and exit code 1."""
    try:
        app(argv, prog_name="peanut-serve state")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve state: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
