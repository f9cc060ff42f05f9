"""The command `peanut-serve ctl`: a client of the admin API of a running server."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import BaseModel

from converters.cli import console
from converters.cli.flags import in_flags
from converters.cli.options import Json
from converters.errors import PeanutError
from peanut_serve.cli.ctl import release
from peanut_serve.cli.ctl.client import AdminClient, segment
from peanut_serve.cli.ctl.output import (
    AnyChange,
    AnyEngine,
    AnyVariant,
    print_change,
    print_engine,
    print_usage,
    print_variant,
    print_variants,
)
from peanut_serve.errors import AdminRequestError
from peanut_serve.settings.admin_key import KEY_VARIABLE
from peanut_serve.web.schema import Registration, Rollback
from peanut_serve.web.usage import UsageReport

HELP = f"""Show and change what a running `peanut-serve` or a fleet serves, through its admin API.

The key is the one that the server was started with, or one of its --keys file, read from {KEY_VARIABLE} or from
--key-file. It is not encrypted over http: use https or an ssh tunnel to reach another machine.

Examples:

  peanut-serve ctl list

  peanut-serve ctl register gsm8k gsm8k-2026-11

  peanut-serve ctl activate gsm8k

  peanut-serve ctl rollback gsm8k

  peanut-serve ctl --url http://gpu7:8001 --key-file ~/.peanut-key list --json | jq '.[].name'
"""

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help=HELP
)
app.add_typer(release.app, name="release")
_Url = Annotated[str, typer.Option("--url", envvar="PEANUT_ADMIN_URL", help="URL of the admin API.")]
_KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help=f"File that contains the admin key (default: the key in {KEY_VARIABLE})."),
]
_CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        envvar="PEANUT_ADMIN_CA_FILE",
        help="File with the certificates to trust, for https (default: those of the system).",
    ),
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the variant.")]
_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Entry of a variants folder, or Hub id.")]
_Drain = Annotated[
    bool,
    typer.Option("--drain", help="Wait for its requests; those that take longer than --drain-timeout are aborted."),
]
_Digest = Annotated[
    str | None, typer.Option("--digest", help="Earlier digest, as listed by `show` (default: the previous one).")
]
_Hold = Annotated[bool, typer.Option("--hold", help="Hold it until a reload, even if the files change.")]


def _path(name: str, verb: str = "") -> str:
    return "variants/" + segment(name) + verb


@app.callback()
def _connect(
    context: typer.Context,
    url: _Url = "http://127.0.0.1:8001",
    key_file: _KeyFile = None,
    ca_file: _CaFile = None,
) -> None:
    context.obj = AdminClient(url, key_file, ca_file)


@app.command("list", help="List all variants.")
def _list(context: typer.Context, as_json: Json = False) -> None:
    print_variants(context.obj.ask(list[AnyVariant], "GET", "variants"), as_json)


@app.command("show", help="Show one variant.")
def _show(context: typer.Context, name: _Name, as_json: Json = False) -> None:
    print_variant(context.obj.ask(AnyVariant, "GET", _path(name)), as_json)


@app.command("engine", help="Show the state of the engine, and the active variant.")
def _engine(context: typer.Context, as_json: Json = False) -> None:
    print_engine(context.obj.ask(AnyEngine, "GET", "engine"), as_json)


@app.command("usage", help="Show what each team has used of each variant since the start of the server.")
def _usage(context: typer.Context, as_json: Json = False) -> None:
    print_usage(context.obj.ask(UsageReport, "GET", "usage"), as_json)


@app.command("register", help="Add a variant from a variants folder or an allowed Hub id.")
def _register(context: typer.Context, name: _Name, source: _Source) -> None:
    _change(context, name, "POST", "variants", Registration(name=name, source=source))


@app.command("unregister", help="Remove a variant; its files are kept.")
def _unregister(context: typer.Context, name: _Name, drain: _Drain = False) -> None:
    _change(context, name, "DELETE", _path(name, "?drain=true" if drain else ""))


@app.command("activate", help="Swap a variant in, and wait until the engine has its weights.")
def _activate(context: typer.Context, name: _Name) -> None:
    _change(context, name, "POST", _path(name, "/activate"))


@app.command("reload", help="Reload a variant; keep the old version for a rollback.")
def _reload(context: typer.Context, name: _Name) -> None:
    _change(context, name, "POST", _path(name, "/reload"))


@app.command("rollback", help="Roll back to an earlier version of a variant.")
def _rollback(context: typer.Context, name: _Name, digest: _Digest = None, hold: _Hold = False) -> None:
    _change(context, name, "POST", _path(name, "/rollback"), Rollback(digest=digest, hold=hold))


@app.command("preload", help="Evaluate the weights of a variant into host memory.")
def _preload(context: typer.Context, name: _Name) -> None:
    _change(context, name, "POST", _path(name, "/preload"))


@app.command("pin", help="Keep the weights of a variant in host memory.")
def _pin(context: typer.Context, name: _Name) -> None:
    _change(context, name, "POST", _path(name, "/pin"))


@app.command("unpin", help="Unpin a variant.")
def _unpin(context: typer.Context, name: _Name) -> None:
    _change(context, name, "POST", _path(name, "/unpin"))


def _change(context: typer.Context, name: str, method: str, path: str, body: BaseModel | None = None) -> None:
    """Request a change, which may take minutes, and print the result."""
    try:
        with console.err.status("waiting for the server"):  # shows nothing if stderr is not a terminal
            done = context.obj.ask(AnyChange, method, path, body, has_timeout=False)
    except KeyboardInterrupt:
        raise AdminRequestError("stopped waiting, but the server continues; see peanut-serve ctl list") from None
    print_change(name, done)


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve ctl` with these arguments: an error is one line on stderr and exit code 1."""
    try:
        app(argv, prog_name="peanut-serve ctl")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve ctl: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
