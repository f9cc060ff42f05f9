"""The command `peanut-serve ctl`: a client of the admin API of a running server."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar
from urllib.parse import quote

import httpx
import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from converters.cli import console
from converters.cli.console_adapters import print_facts
from converters.cli.options import Json
from converters.errors import OptionError, PeanutError
from peanut_serve.errors import AdminRequestError
from peanut_serve.settings.admin_key import KEY_VARIABLE, checked_key
from peanut_serve.web.schema import EngineStatus, ErrorAnswer, Registration, Rollback, VariantStatus

HELP = f"""See and change what a running `peanut-serve --mode merged` serves, by its admin API.

The key is the one that the server was started with: in {KEY_VARIABLE}, or a file of --key-file. It is sent as it is;
reach another machine by https or through an ssh tunnel.

Examples:

  peanut-serve ctl list

  peanut-serve ctl register gsm8k gsm8k-2026-11

  peanut-serve ctl activate gsm8k

  peanut-serve ctl rollback gsm8k

  peanut-serve ctl --url http://gpu7:8001 --key-file ~/.peanut-key list --json | jq '.[].name'
"""

# seconds; the admin API shares its event loop with the server, which may be busy
_SOON = 60.0
_HERE = ("127.0.0.1", "::1", "localhost")

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help=HELP
)
_T = TypeVar("_T")
_Url = Annotated[str, typer.Option("--url", envvar="PEANUT_ADMIN_URL", help="Of the admin API.")]
_KeyFile = Annotated[Path | None, typer.Option("--key-file", help=f"With the key in it; else {KEY_VARIABLE} has it.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the variant.")]
_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Entry of the folders of variants, or Hub id.")]
_Drain = Annotated[bool, typer.Option("--drain", help="Take no more of its requests, and wait for those there are.")]
_Digest = Annotated[str | None, typer.Option("--digest", help="One that `show` has; without, the one before.")]


@dataclass(frozen=True)
class _Admin:
    """The admin API of a server.

    Attributes:
        url: what comes before /admin/v1.
        key_file: holds the key; without, the environment does.
    """

    url: str
    key_file: Path | None

    def ask(self, answer: type[_T], method: str, path: str, body: BaseModel | None = None, soon: bool = True) -> _T:
        """Send a request, and give its answer as an `answer`. One that is not due `soon` may take any time.

        Raises `AdminRequestError`: no answer, a refusal, or the answer of something else.
        """
        response = self._send(method, path, body, _SOON if soon else None)
        try:
            if response.is_success:
                return TypeAdapter(answer).validate_json(response.content or b"null")
            refusal = ErrorAnswer.model_validate_json(response.content).error
        except ValidationError:
            raise AdminRequestError(
                f"{self.url} answered {response.status_code}, not as the admin API of this version does; "
                "--url must have its port, which is not that of completions"
            ) from None
        raise AdminRequestError(_told(response, refusal.message))

    def _send(self, method: str, path: str, body: BaseModel | None, timeout: float | None) -> httpx.Response:
        headers = {b"Authorization": b"Bearer " + self._key().encode()}
        content = body.model_dump() if body else None
        try:
            with httpx.Client(
                timeout=httpx.Timeout(timeout, connect=_SOON),
                trust_env=httpx.URL(self.url).host not in _HERE,  # a proxy would look for the server on its own host
            ) as client:
                url = f"{self.url.rstrip('/')}/admin/v1/{path}"
                return client.request(method, url, headers=headers, json=content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AdminRequestError(self._failure(error)) from None

    def _key(self) -> str:
        if self.key_file is not None:
            return checked_key(self.key_file.expanduser().read_text("utf-8", "replace"), str(self.key_file))
        if (key := os.environ.get(KEY_VARIABLE)) is None:
            raise OptionError(f"there is no admin key; set {KEY_VARIABLE}, or give --key-file")
        return checked_key(key, KEY_VARIABLE)

    def _failure(self, error: Exception) -> str:
        if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
            return f"{self.url} is no URL; wanted one like http://127.0.0.1:8001"
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            why = f"cannot reach {self.url} ({error or 'no answer'})"
            return f"{why}; is `peanut-serve --mode merged` running, and its admin API there? --url is where to look"
        reason = str(error) or type(error).__name__
        return f"{self.url} did not answer to the end ({reason}); look at the server's log, and ask again"


def _told(response: httpx.Response, message: str) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"the server refused the key; {KEY_VARIABLE} or --key-file must have the one it was started with"
    if after := response.headers.get("Retry-After"):
        return f"{message}; try again in {after} s"
    return message


def _path(name: str, verb: str = "") -> str:
    # one segment, whatever is in it; a name of dots would be taken for steps upwards
    return "variants/" + quote(name, safe="").replace(".", "%2E") + verb


@app.callback()
def _connect(context: typer.Context, url: _Url = "http://127.0.0.1:8001", key_file: _KeyFile = None) -> None:
    context.obj = _Admin(url, key_file)


@app.command("list", help="All variants, a line each.")
def _list(context: typer.Context, as_json: Json = False) -> None:
    variants = context.obj.ask(list[VariantStatus], "GET", "variants")
    if as_json:
        print(json.dumps([variant.model_dump(mode="json") for variant in variants], indent=2))
        return
    numbers = (Column(name, justify="right") for name in ("RUNNING", "WAITING", "REQUESTS", "HOST", "SWAP"))
    texts = (Column("NAME", overflow="fold"), "KIND", Column("STATE", no_wrap=True))
    table = Table(*texts, *numbers, box=None, pad_edge=False)
    for variant in variants:
        table.add_row(*map(escape, _row(variant)))
    width = None if console.out.is_terminal else 500  # a pipe has none to fold at
    Console(highlight=False, width=width).print(table)


def _row(variant: VariantStatus) -> tuple[str, ...]:
    counts = map(str, (variant.running, variant.waiting, variant.requests))
    swap = variant.last_swap_seconds
    seconds = "-" if swap is None else f"{swap:.2f} s"
    return variant.name, variant.kind, _state(variant), *counts, console.size_text(variant.host_bytes), seconds


def _state(variant: VariantStatus) -> str:
    return variant.state.value + (", pinned" if variant.pinned else "")


@app.command("show", help="All about one variant.")
def _show(context: typer.Context, name: _Name, as_json: Json = False) -> None:
    _print_status(context.obj.ask(VariantStatus, "GET", _path(name)), as_json)


@app.command("engine", help="What the engine does, and whose weights it has.")
def _engine(context: typer.Context, as_json: Json = False) -> None:
    _print_status(context.obj.ask(EngineStatus, "GET", "engine"), as_json)


def _print_status(status: BaseModel, as_json: bool) -> None:
    if as_json:
        print(status.model_dump_json(indent=2))
        return
    facts = status.model_dump(mode="json")
    for key in ("host_bytes", "host_cache_bytes", "host_cache_limit"):
        if key in facts:
            facts[key] = console.size_text(facts[key])
    if "swap_seconds" in facts:
        facts["swap_seconds"] = [f"{phase} {seconds:.3f}" for phase, seconds in facts["swap_seconds"].items()]
    print_facts({key: escape(value) if isinstance(value, str) else value for key, value in facts.items()})


@app.command("register", help="Give an entry of the folders of variants, or an allowed Hub id, a name.")
def _register(context: typer.Context, name: _Name, source: _Source) -> None:
    _change(context, VariantStatus, "POST", "variants", Registration(name=name, source=source))


@app.command("unregister", help="Remove a variant; its files stay.")
def _unregister(context: typer.Context, name: _Name, drain: _Drain = False) -> None:
    _change(context, type(None), "DELETE", _path(name, "?drain=true" if drain else ""))
    console.out.print(f"{name}: removed", markup=False)


@app.command("activate", help="Swap a variant in, and wait until the engine has its weights.")
def _activate(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/activate"))


@app.command("reload", help="Read a variant's source again. What was there is kept for a rollback.")
def _reload(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/reload"))


@app.command("rollback", help="Go back to an earlier version of a variant.")
def _rollback(context: typer.Context, name: _Name, digest: _Digest = None) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/rollback"), Rollback(digest=digest))


@app.command("pin", help="Keep a variant's weights on the host.")
def _pin(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/pin"))


@app.command("unpin", help="Pin a variant no longer.")
def _unpin(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/unpin"))


def _change(context: typer.Context, answer: type[_T], method: str, path: str, body: BaseModel | None = None) -> None:
    """Ask for a change, which may take minutes, and say what came of it."""
    try:
        with console.err.status("waiting for the server"):  # nothing where stderr is no terminal
            status = context.obj.ask(answer, method, path, body, soon=False)
    except KeyboardInterrupt:
        raise AdminRequestError("no longer waiting; the server goes on, see: peanut-serve ctl list") from None
    if isinstance(status, VariantStatus):
        console.out.print(f"{status.name}: {_state(status)}, digest {status.digest or '-'}", markup=False)


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve ctl` with these arguments: a refusal is one line on stderr and exit code 1."""
    try:
        app(argv, prog_name="peanut-serve ctl")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve ctl: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
