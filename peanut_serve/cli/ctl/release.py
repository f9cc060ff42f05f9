"""`peanut-serve ctl release`: new versions of a variant, staged beside the current one."""

import json
import re
from typing import Annotated, Any

import typer
from pydantic import BaseModel, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from converters.cli import console
from converters.cli.console_adapters import print_facts
from converters.cli.options import Json
from converters.errors import OptionError
from peanut_serve.cli.ctl.client import segment
from peanut_serve.errors import AdminRequestError
from peanut_serve.releases.fleet_schema import FleetReleaseStatus
from peanut_serve.releases.schema import Promotion, Reason, ReleaseStatus, Staging, Weighing

HELP = """Release a new version of a variant: stage it, check it, give it a share of the requests, promote it.

Examples:

\b
  peanut-serve ctl release stage gsm8k --source gsm8k-2026-12
  peanut-serve ctl release weight gsm8k 10
  peanut-serve ctl release show gsm8k
  peanut-serve ctl release promote gsm8k
  peanut-serve ctl release rollback gsm8k --reason 'wrong units'
"""

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help=HELP)
# a fleet's answer has all fields of a server's, and more
AnyRelease = Annotated[FleetReleaseStatus | ReleaseStatus, Field(union_mode="left_to_right")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the variant.")]
_Weight = Annotated[int, typer.Argument(metavar="PERCENT", min=0, max=100, help="Share of the requests for it.")]
_Source = Annotated[
    str | None,
    typer.Option("--source", help="Entry of a variants folder, or Hub id (default: that of the variant)."),
]
_Expected = Annotated[str | None, typer.Option("--digest", help="Digest of the version that has to be there.")]
_Force = Annotated[bool, typer.Option("--force", help="Although it has not passed its canary set.")]
_ErrorRate = Annotated[
    float, typer.Option("--max-error-rate", min=0, max=1, help="Share of failures above which it is rolled back.")
]
_Requests = Annotated[
    int, typer.Option("--min-requests", min=1, max=1000, help="Number of requests before which it is not.")
]
_Why = Annotated[str | None, typer.Option("--reason", help="Why, for the audit log.")]


@app.command("list", help="List the latest release of every variant that had one.")
def _list(context: typer.Context, as_json: Json = False) -> None:
    found: list[ReleaseStatus] = context.obj.ask(list[AnyRelease], "GET", "releases")
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
    else:
        _print_table(found)
    for one in found:
        _raise_if_replicas_differ(one)


def _print_table(found: list[ReleaseStatus]) -> None:
    table = Table("NAME", "STATE", "WEIGHT", "DIGEST", "REPLACES", "CANARY", "FAILED", box=None, pad_edge=False)
    for one in found:
        failed = f"{one.failed} of {one.watched}"
        table.add_row(
            escape(one.name), one.state, f"{one.weight} %", one.digest[:12], one.replaces[:12], _canary(one), failed
        )
    Console(highlight=False, width=None if console.out.is_terminal else 500).print(table)


@app.command("show", help="Show the latest release of a variant, its canary set, and what happened.")
def _show(context: typer.Context, name: _Name, as_json: Json = False) -> None:
    found: ReleaseStatus = context.obj.ask(AnyRelease, "GET", _path(name))
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        _print_release(found)
    _raise_if_replicas_differ(found)


def _print_release(found: ReleaseStatus) -> None:
    hidden = {"canary", "events", "passed", "replicas", "message"}
    facts = found.model_dump(exclude=hidden) | {"canary": _canary(found)}
    print_facts({key: escape(value) if isinstance(value, str) else value for key, value in facts.items()})
    for answer in found.canary:
        told = "; ".join(answer.problems) or "passed"
        console.out.print(f"  {answer.prompt!r} -> {answer.answer!r}: {told}", markup=False)
    for event in found.events:
        detail = f": {event.detail}" if event.detail else ""
        at = event.at.isoformat(timespec="seconds")
        console.out.print(f"  {at} {event.action} {event.digest[:12]}{detail}", markup=False)
    if isinstance(found, FleetReleaseStatus):
        table = Table("REPLICA", "STATE", "WEIGHT", "DIGEST", "CANARY", "FAILED", "ERROR", box=None, pad_edge=False)
        for one in found.replicas:
            own = one.status
            cells = [own.state, f"{own.weight} %", own.digest[:12], _canary(own)] if own else ["-"] * 4
            failed = f"{own.failed} of {own.watched}" if own else "-"
            error = one.withheld or (one.error if own is None else None) or "-"
            table.add_row(*map(escape, [one.replica or "(lost)", *cells, failed, error]))
        Console(highlight=False, width=None if console.out.is_terminal else 500).print(table)


@app.command("hold", help="Keep a variant at its version until a reload, whatever happens to its files.")
def _hold(context: typer.Context, name: _Name) -> None:
    _ask(context, None, name, "/hold")
    console.out.print(f"{name}: held", markup=False)


@app.command("stage", help="Make a new version reachable as NAME@staged, and ask it its canary set.")
def _stage(context: typer.Context, name: _Name, source: _Source = None, digest: _Expected = None) -> None:
    if digest is not None and re.fullmatch("[0-9a-f]{40}", digest) is None:
        raise OptionError(
            f"--digest is {digest}; expected the 40 hexadecimal digits that peanut-serve ctl show prints"
        )
    _print_checked(_ask(context, AnyRelease, name, "/stage", Staging(source=source, digest=digest)))


@app.command("check", help="Ask the staged version its canary set again.")
def _check(context: typer.Context, name: _Name) -> None:
    _print_checked(_ask(context, AnyRelease, name, "/check"))


@app.command("weight", help="Give the staged version a share of the requests for the variant.")
def _weigh(
    context: typer.Context,
    name: _Name,
    weight: _Weight,
    max_error_rate: _ErrorRate = 0.05,
    min_requests: _Requests = 20,
    force: _Force = False,
) -> None:
    weighing = Weighing(weight=weight, max_error_rate=max_error_rate, min_requests=min_requests, force=force)
    _print(_ask(context, AnyRelease, name, "/weight", weighing))


@app.command("promote", help="Move the variant to the staged version; the one before is kept for a rollback.")
def _promote(context: typer.Context, name: _Name, force: _Force = False) -> None:
    _print(_ask(context, AnyRelease, name, "/promote", Promotion(force=force)))


@app.command("rollback", help="End the release, or return from the version that it gave. The variant stays held.")
def _rollback(context: typer.Context, name: _Name, reason: _Why = None) -> None:
    _print(_ask(context, AnyRelease, name, "/rollback", Reason(reason=reason)))


def _path(name: str, verb: str = "") -> str:
    return "releases/" + segment(name) + verb


def _ask(context: typer.Context, answer: Any, name: str, verb: str, body: BaseModel | None = None) -> ReleaseStatus:
    try:
        with console.err.status("waiting for the server"):
            found: ReleaseStatus = context.obj.ask(answer, "POST", _path(name, verb), body, has_timeout=False)
            return found
    except KeyboardInterrupt:
        raise AdminRequestError(
            "stopped waiting, but the server continues; see peanut-serve ctl release list"
        ) from None


def _print(release: ReleaseStatus) -> None:
    share = f", {release.weight} % of the requests" if release.state == "staged" else ""
    state = release.state.replace("_", " ")
    text = f"{release.name}: {state}, digest {release.digest}{share}, canary {_canary(release)}"
    console.out.print(text, markup=False)
    _raise_if_replicas_differ(release)


def _raise_if_replicas_differ(release: ReleaseStatus) -> None:
    """Raise `AdminRequestError` if replicas of a fleet do not have a release as it is wanted."""
    if isinstance(release, FleetReleaseStatus) and not release.agree:
        raise AdminRequestError(f"the replicas do not agree about the release of {release.name}: {release.message}")


def _print_checked(release: ReleaseStatus) -> None:
    """Print a release. Raises `AdminRequestError` if it has not passed its canary set."""
    _print(release)
    failed = [one for one in release.canary if one.problems]
    if failed:
        told = "; ".join(f"{one.prompt[:40]!r}: {', '.join(one.problems)}" for one in failed)
        raise AdminRequestError(
            f"{len(failed)} of {len(release.canary)} canaries of {release.name} failed: {told}; it stays staged"
        )


def _canary(release: ReleaseStatus) -> str:
    if release.passed is None:
        return "none"
    if not release.canary:
        return "passed" if release.passed else "not asked"
    failed = sum(bool(one.problems) for one in release.canary)
    return "passed" if not failed else f"{failed} of {len(release.canary)} failed"
