"""The command `peanut-serve key`: a new key, and its entry of the keys file."""

import hashlib
import json
import sys
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from converters.cli.flags import in_flags
from converters.cli.options import Json
from converters.errors import OptionError, PeanutError
from peanut_serve.tenants.keys import ALL, Key, Role, new_token

HELP = """Make a key for a team or an operator, and the entry for the file of `peanut-serve --keys`.

The key is shown now and never again: the file has its hash. Give it to the team, and add the entry to the list under
`keys:` in the file. A running server reads the file within a second. To replace a key, make another, put both hashes
into the one entry (sha256: [OLD, NEW]), and remove the old one when nobody uses it any more.

Examples:

  peanut-serve key search

  peanut-serve key search --variants 'math-*' --variants gsm8k --requests-per-minute 600 --places 32

  peanut-serve key night-shift --role read-only
"""


def _key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the team or operator.")],
    role: Annotated[
        Role, typer.Option("--role", help="What the key is for: requests, or the admin API and the console.")
    ] = Role.DATA,
    variants: Annotated[
        list[str] | None,
        typer.Option("--variants", help="Variant that it may use, or a pattern (default: all). Can be repeated."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", help="Requests that it may send in a minute.")
    ] = None,
    places: Annotated[
        int | None, typer.Option("--places", help="Requests that it may have in the server at once.")
    ] = None,
    as_json: Json = False,
) -> None:
    given = {"variants": variants, "requests_per_minute": requests_per_minute, "places": places}
    token = new_token()
    fields = {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "role": role}
    try:
        key = Key.model_validate({**fields, **{field: value for field, value in given.items() if value is not None}})
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = "".join(f"{part}: ".replace("_", "-") for part in first["loc"])
        raise OptionError(f"{field}{first['msg'].removeprefix('Value error, ')}") from None
    entry = _entry(key)
    if as_json:
        print(json.dumps({"key": token, "entry": entry}, indent=2))
        return
    print(f"the key of {name}, which is shown only now:\n\n{token}\n\nits entry for the keys file:\n")
    lines = [f"{field}: {json.dumps(value)}" for field, value in entry.items()]  # JSON is YAML, too
    print("- " + "\n  ".join(lines))


def _entry(key: Key) -> dict[str, object]:
    entry: dict[str, object] = {"name": key.name, "sha256": key.sha256[0], "role": key.role.value}
    if key.variants != ALL:
        entry["variants"] = list(key.variants)
    limits = {"requests-per-minute": key.requests_per_minute, "places": key.places}
    return {**entry, **{field: value for field, value in limits.items() if value is not None}}


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve key` with these arguments: an error is one line on stderr and exit code 1."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name="key", help=HELP)(_key)
    try:
        app(argv, prog_name="peanut-serve key")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve key: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
