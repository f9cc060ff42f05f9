"""Where a fleet is to run: on this machine now, or on a cluster, by the config that is written for it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from converters.errors import OptionError
from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.ray.declaration import declaration
from peanut_serve.ray.one_machine import serve_here
from peanut_serve.ray.settings import FleetSettings
from peanut_serve.settings.hosts import refuse_open
from peanut_serve.web.connections import bind


@dataclass(frozen=True)
class Target:
    """Where a fleet is to run.

    Attributes:
        host: address to listen on; None for loopback, or with keys for all addresses of each node.
        port: to listen on.
        output: file to write Serve's config to.
        overwrite: whether that file is replaced.
        is_local: write nothing, and serve on this machine.
    """

    host: str | None
    port: int
    output: Path
    overwrite: bool
    is_local: bool


def deploy(settings: FleetSettings | ClassifierSettings, target: Target) -> None:
    """Write Serve's config, or serve until SIGINT or SIGTERM. Raises `OptionError`, and what `serve_here` raises."""
    is_open = settings.key_file is None and settings.keys is None
    host = target.host or ("127.0.0.1" if target.is_local or is_open else "0.0.0.0")
    refuse_open(host, not is_open)
    if is_open and not target.is_local:
        print("note: without --api-key-file, everybody who reaches the address may ask", file=sys.stderr)
    if target.is_local:
        bind(host, target.port, "the fleet").close()  # not after the engines have started
        serve_here(settings, host, target.port)
        return
    if target.output.exists() and not target.overwrite:
        raise OptionError(f"{target.output} exists; give another --output, or --overwrite")
    target.output.write_text(yaml.safe_dump(declaration(settings, host, target.port), sort_keys=False))
    print(f"wrote {target.output}; start the fleet, or change it, with: serve deploy {target.output}")
