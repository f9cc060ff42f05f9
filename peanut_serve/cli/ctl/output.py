"""What `peanut-serve ctl` prints of a server or a fleet. A disagreement of replicas is printed, and is an error."""

import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from converters.cli import console
from converters.cli.console_adapters import print_facts
from peanut_serve.errors import AdminRequestError
from peanut_serve.web.fleet_schema import FleetChange, FleetEngineStatus, FleetEntry, FleetVariantStatus
from peanut_serve.web.schema import EngineStatus, VariantStatus
from peanut_serve.web.usage import UsageReport

# a fleet's answer has all fields of a server's, and more
_Either = Field(union_mode="left_to_right")
AnyVariant = Annotated[FleetVariantStatus | VariantStatus, _Either]
AnyEngine = Annotated[FleetEngineStatus | EngineStatus, _Either]
AnyChange = Annotated[FleetChange | FleetEntry | VariantStatus | None, _Either]

_SIZES = ("host_bytes", "host_cache_bytes", "host_cache_limit")


def print_variants(variants: Sequence[VariantStatus], as_json: bool) -> None:
    """The table of `list`. Raises `AdminRequestError` if replicas disagree."""
    in_fleet = [one for one in variants if isinstance(one, FleetVariantStatus)]
    if as_json:
        print(json.dumps([variant.model_dump(mode="json") for variant in variants], indent=2))
    else:
        numbers = [Column(name, justify="right") for name in ("RUNNING", "WAITING", "REQUESTS", "HOST", "SWAP")]
        replicas = [Column("REPLICAS", justify="right")] if in_fleet else []
        table = _table(Column("NAME", overflow="fold"), "KIND", Column("STATE", no_wrap=True), *numbers, *replicas)
        for variant in variants:
            alike = [_alike(variant)] if isinstance(variant, FleetVariantStatus) else []
            table.add_row(*map(escape, [*_row(variant), *alike]))
        _print(table)
    if disputed := [one for one in in_fleet if not one.agree]:
        told = "; ".join(f"{one.name}: {one.message}" for one in disputed)
        raise AdminRequestError(
            f"the replicas do not agree about {len(disputed)} of {len(variants)} variants: {told}"
        )


def print_variant(variant: VariantStatus, as_json: bool) -> None:
    """The facts of `show`, with a row per replica. Raises `AdminRequestError` if replicas disagree."""
    _print_facts(variant, as_json)
    if not isinstance(variant, FleetVariantStatus):
        return
    if not as_json:
        table = _table("REPLICA", "STATE", "DIGEST", "RUNNING", "WAITING", "REQUESTS", "HOST", "ERROR")
        for one in variant.replicas:
            error = one.withheld or one.error or (one.status.error if one.status else None) or "-"
            cells = _row(one.status) if one.status else ("", "", *["-"] * 5)
            digest = (one.status.digest if one.status else None) or "-"
            table.add_row(*map(escape, [one.replica or "(lost)", cells[2], digest, *cells[3:7], error]))
        _print(table)
    _raise_if(variant.message)


def print_engine(engine: EngineStatus, as_json: bool) -> None:
    """The facts of `engine`, with a row per replica. Raises `AdminRequestError` if one did not answer."""
    _print_facts(engine, as_json)
    if not isinstance(engine, FleetEngineStatus):
        return
    if not as_json:
        table = _table("REPLICA", "STATE", "ACTIVE", "DIGEST", "RESTARTS", "ERROR")
        for one in engine.replicas:
            own = one.engine
            cells = [own.state, own.active, own.digest, str(own.restarts)] if own else ["-"] * 4
            table.add_row(*map(escape, [one.replica or "(lost)", *cells, one.error or "-"]))
        _print(table)
    _raise_if(engine.message)


def print_usage(report: UsageReport, as_json: bool) -> None:
    """The table of `usage`."""
    if as_json:
        print(report.model_dump_json(indent=2))
        return
    numbers = [Column(name, justify="right") for name in ("REQUESTS", "PROMPT TOKENS", "GENERATED", "SECONDS")]
    table = _table(Column("VARIANT", overflow="fold"), "TENANT", *numbers)
    for one in report.usage:
        counts = map(str, (one.requests, one.prompt_tokens, one.generated_tokens))
        table.add_row(escape(one.variant), escape(one.tenant), *counts, f"{one.engine_seconds:.1f}")
    _print(table)
    console.out.print(f"since {report.since:%Y-%m-%d %H:%M:%S} UTC", markup=False)


def print_change(name: str, done: FleetChange | FleetEntry | VariantStatus | None) -> None:
    """What a change has led to. Raises `AdminRequestError` if replicas disagree now."""
    if done is None:
        console.out.print(f"{name}: removed", markup=False)
    elif isinstance(done, VariantStatus):
        console.out.print(f"{done.name}: {_state(done)}, digest {done.digest or '-'}", markup=False)
    elif isinstance(done, FleetEntry):
        status = VariantStatus.model_validate(done.answer)
        text = f"{status.name}: {_state(status)} at replica {done.replica}, digest {status.digest or '-'}"
        console.out.print(text, markup=False)
    else:
        made = sum(entry.is_done for entry in done.replicas)
        digests = {entry.digest for entry in done.replicas if entry.is_done}
        digest = (digests.pop() or "-") if len(digests) == 1 else "differs"
        console.out.print(f"{name}: {made} of {len(done.replicas)} replicas, digest {digest}", markup=False)
        if not done.agree:
            table = _table("REPLICA", "STATUS", "DIGEST", "ERROR")
            for one in done.replicas:
                cells = [one.replica or "(lost)", str(one.status), one.digest or "-", one.reason or "-"]
                table.add_row(*map(escape, cells))
            _print(table)
        _raise_if(done.message)


def _raise_if(message: str) -> None:
    if message:
        raise AdminRequestError(f"the replicas do not agree: {message}")


def _table(*columns: Column | str) -> Table:
    return Table(*columns, box=None, pad_edge=False)


def _print(table: Table) -> None:
    width = None if console.out.is_terminal else 500  # a pipe has no width to fold at
    Console(highlight=False, width=width).print(table)


def _row(variant: VariantStatus) -> tuple[str, ...]:
    counts = map(str, (variant.running, variant.waiting, variant.requests))
    swap = variant.last_swap_seconds
    seconds = "-" if swap is None else f"{swap:.2f} s"
    return variant.name, variant.kind, _state(variant), *counts, console.size_text(variant.host_bytes), seconds


def _state(variant: VariantStatus) -> str:
    return variant.state.value + (", pinned" if variant.pinned else "") + (", held" if variant.held else "")


def _alike(variant: FleetVariantStatus) -> str:
    served = sum(one.status is not None and not one.withheld for one in variant.replicas)
    return f"{served} of {len(variant.replicas)}" + ("" if variant.agree else ", differ")


def _print_facts(status: BaseModel, as_json: bool) -> None:
    if as_json:
        print(status.model_dump_json(indent=2))
        return
    facts = {
        key: value for key, value in status.model_dump(mode="json").items() if key not in ("replicas", "message")
    }
    for key in _SIZES:
        if key in facts:
            facts[key] = console.size_text(facts[key])
    if "swap_seconds" in facts:
        facts["swap_seconds"] = [f"{phase} {seconds:.3f}" for phase, seconds in facts["swap_seconds"].items()]
    print_facts({key: escape(value) if isinstance(value, str) else value for key, value in facts.items()})
