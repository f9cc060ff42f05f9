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
from converters.cli.flags import in_flags
from converters.cli.options import Json
from converters.errors import OptionError, PeanutError
from peanut_serve.errors import AdminRequestError
from peanut_serve.settings.admin_key import KEY_VARIABLE, checked_key
from peanut_serve.web.schema import EngineStatus, ErrorAnswer, Registration, Rollback, VariantStatus

HELP = f"""Show and change what a running `peanut-serve --mode merged` serves, through its admin API.

The key is the one that the server was started with, read from {KEY_VARIABLE} or from --key-file. It is not encrypted
over http: use https or an ssh tunnel to reach another machine.

Examples:

  peanut-serve ctl list

  peanut-serve ctl register gsm8k gsm8k-2026-11

  peanut-serve ctl activate gsm8k

  peanut-serve ctl rollback gsm8k

  peanut-serve ctl --url http://gpu7:8001 --key-file ~/.peanut-key list --json | jq '.[].name'
"""

# seconds; the admin API shares its event loop with the server, which may be busy
_TIMEOUT = 60.0
_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help=HELP
)
_T = TypeVar("_T")
_Url = Annotated[str, typer.Option("--url", envvar="PEANUT_ADMIN_URL", help="URL of the admin API.")]
_KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help=f"File that contains the admin key (default: the key in {KEY_VARIABLE})."),
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the variant.")]
_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Entry of a variants folder, or Hub id.")]
_Drain = Annotated[bool, typer.Option("--drain", help="Stop accepting requests for it, and wait for running ones.")]
_Digest = Annotated[
    str | None, typer.Option("--digest", help="Earlier digest, as listed by `show` (default: the previous one).")
]
_Hold = Annotated[bool, typer.Option("--hold", help="Hold it until a reload, even if the files change.")]


@dataclass(frozen=True)
class _Admin:
    """The admin API of a server.

    Attributes:
        url: its URL, without /admin/v1.
        key_file: file with the key; by default the key is read from the environment.
    """

    url: str
    key_file: Path | None

    def ask(
        self, answer: type[_T], method: str, path: str, body: BaseModel | None = None, has_timeout: bool = True
    ) -> _T:
        """Send a request and return the response as an `answer`. Without `has_timeout`, wait as long as it takes.

        Raises `AdminRequestError` for no response, an error, or a response that is not from the admin API.
        """
        response = self._send(method, path, body, _TIMEOUT if has_timeout else None)
        try:
            if response.is_success:
                return TypeAdapter(answer).validate_json(response.content or b"null")
            refusal = ErrorAnswer.model_validate_json(response.content).error
        except ValidationError:
            raise AdminRequestError(
                f"{self.url} answered {response.status_code}, but not like the admin API of this version; "
                "--url needs the admin port, not the port for completions"
            ) from None
        raise AdminRequestError(_explain(response, refusal.message))

    def _send(self, method: str, path: str, body: BaseModel | None, timeout: float | None) -> httpx.Response:
        headers = {b"Authorization": b"Bearer " + self._key().encode()}
        content = body.model_dump() if body else None
        try:
            with httpx.Client(
                timeout=httpx.Timeout(timeout, connect=_TIMEOUT),
                trust_env=httpx.URL(self.url).host not in _LOCAL_HOSTS,  # a proxy would resolve these to itself
            ) as client:
                url = f"{self.url.rstrip('/')}/admin/v1/{path}"
                return client.request(method, url, headers=headers, json=content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AdminRequestError(self._failure(error)) from None

    def _key(self) -> str:
        if self.key_file is not None:
            return checked_key(self.key_file.expanduser().read_text("utf-8", "replace"), str(self.key_file))
        if (key := os.environ.get(KEY_VARIABLE)) is None:
            raise OptionError(f"there is no admin key; set {KEY_VARIABLE}, or use --key-file")
        return checked_key(key, KEY_VARIABLE)

    def _failure(self, error: Exception) -> str:
        if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
            return f"{self.url} is not a valid URL; expected one like http://127.0.0.1:8001"
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            found = f"cannot reach {self.url} ({error or 'no response'})"
            return f"{found}; check --url, and that `peanut-serve --mode merged --admin-port` is running"
        reason = str(error) or type(error).__name__
        return f"{self.url} did not complete its response ({reason}); see the server's log, and retry"


def _explain(response: httpx.Response, message: str) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"the server rejected the key; {KEY_VARIABLE} or --key-file must contain the one it was started with"
    if after := response.headers.get("Retry-After"):
        return f"{message}; try again in {after} s"
    return message


def _path(name: str, verb: str = "") -> str:
    # always one segment; a name of dots would be resolved as parent folders
    return "variants/" + quote(name, safe="").replace(".", "%2E") + verb


@app.callback()
def _connect(context: typer.Context, url: _Url = "http://127.0.0.1:8001", key_file: _KeyFile = None) -> None:
    context.obj = _Admin(url, key_file)


@app.command("list", help="List all variants.")
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
    width = None if console.out.is_terminal else 500  # a pipe has no width to fold at
    Console(highlight=False, width=width).print(table)


def _row(variant: VariantStatus) -> tuple[str, ...]:
    counts = map(str, (variant.running, variant.waiting, variant.requests))
    swap = variant.last_swap_seconds
    seconds = "-" if swap is None else f"{swap:.2f} s"
    return variant.name, variant.kind, _state(variant), *counts, console.size_text(variant.host_bytes), seconds


def _state(variant: VariantStatus) -> str:
    return variant.state.value + (", pinned" if variant.pinned else "") + (", held" if variant.held else "")


@app.command("show", help="Show one variant.")
def _show(context: typer.Context, name: _Name, as_json: Json = False) -> None:
    _print_status(context.obj.ask(VariantStatus, "GET", _path(name)), as_json)


@app.command("engine", help="Show the state of the engine, and the active variant.")
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


@app.command("register", help="Add a variant from a variants folder or an allowed Hub id.")
def _register(context: typer.Context, name: _Name, source: _Source) -> None:
    _change(context, VariantStatus, "POST", "variants", Registration(name=name, source=source))


@app.command("unregister", help="Remove a variant; its files are kept.")
def _unregister(context: typer.Context, name: _Name, drain: _Drain = False) -> None:
    _change(context, type(None), "DELETE", _path(name, "?drain=true" if drain else ""))
    console.out.print(f"{name}: removed", markup=False)


@app.command("activate", help="Swap a variant in, and wait until the engine has its weights.")
def _activate(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/activate"))


@app.command("reload", help="Reload a variant; keep the old version for a rollback.")
def _reload(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/reload"))


@app.command("rollback", help="Roll back to an earlier version of a variant.")
def _rollback(context: typer.Context, name: _Name, digest: _Digest = None, hold: _Hold = False) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/rollback"), Rollback(digest=digest, hold=hold))


@app.command("preload", help="Evaluate the weights of a variant into host memory.")
def _preload(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/preload"))


@app.command("pin", help="Keep the weights of a variant in host memory.")
def _pin(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/pin"))


@app.command("unpin", help="Unpin a variant.")
def _unpin(context: typer.Context, name: _Name) -> None:
    _change(context, VariantStatus, "POST", _path(name, "/unpin"))


def _change(context: typer.Context, answer: type[_T], method: str, path: str, body: BaseModel | None = None) -> None:
    """Request a change, which may take minutes, and print the result."""
    try:
        with console.err.status("waiting for the server"):  # shows nothing if stderr is not a terminal
            status = context.obj.ask(answer, method, path, body, has_timeout=False)
    except KeyboardInterrupt:
        raise AdminRequestError("stopped waiting, but the server continues; see peanut-serve ctl list") from None
    if isinstance(status, VariantStatus):
        console.out.print(f"{status.name}: {_state(status)}, digest {status.digest or '-'}", markup=False)


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve ctl` with these arguments: an error is one line on stderr and exit code 1."""
    try:
        app(argv, prog_name="peanut-serve ctl")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve ctl: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
