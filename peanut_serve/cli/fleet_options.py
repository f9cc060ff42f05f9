"""The options of `peanut-serve deploy` that engines and classifiers have alike, as parameters are declared."""

from pathlib import Path
from typing import Annotated

import typer

from converters.cli.numbers import COUNT, finite

Replicas = Annotated[int, typer.Option("--replicas", min=1, max=10_000, help="Number of replicas.")]
Gpus = Annotated[
    float, typer.Option("--gpus-per-replica", min=0, max=1024, callback=finite, help="GPUs of each engine.")
]
Cpus = Annotated[
    float,
    typer.Option(
        "--cpus-per-replica",
        min=0,
        max=1024,
        callback=finite,
        help="CPUs of each replica, and threads without a GPU.",
    ),
]
MaxWaiting = Annotated[
    int, typer.Option("--max-waiting", min=1, max=COUNT, help="What may wait for a replica before 429 is answered.")
]
AdminKeyFile = Annotated[
    Path | None, typer.Option("--admin-key-file", help="File with the admin key; turns the admin API on.")
]
State = Annotated[
    Path | None,
    typer.Option("--state", help="Folder of each node for what survives a restart; every engine has a folder in it."),
]
Host = Annotated[
    str | None,
    typer.Option("--host", help="Address to listen on (default: 127.0.0.1; with --api-key-file, all of each node)."),
]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="File to write Serve's config to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace that file if it exists.")]
Local = Annotated[bool, typer.Option("--local", help="Write nothing; serve on this machine until Ctrl-C or SIGTERM.")]


def absolute(given: Path | None) -> Path | None:
    """A path as every node can use it."""
    return given.expanduser().absolute() if given else None
