"""`peanut-serve deploy --classify FOLDER`: classifiers of ONNX exports behind one address, on Ray Serve."""

from pathlib import Path
from typing import Annotated

import typer

from converters.cli.numbers import COUNT, SECONDS, finite
from converters.errors import OptionError
from converters.serving import parse_size
from peanut_serve.cli.server_options import LogFormat, Precision
from peanut_serve.ray.classifiers.settings import ClassifierSettings, Tunables
from peanut_serve.ray.deploying import Target, deploy
from peanut_serve.web.bearer import read_keys

OPTION = "--classify"
HELP = """Serve classifiers that `peanut-merge --format onnx` wrote, behind one address, on a Ray Serve cluster.

Needs pip install 'peanut-serve[ray,onnx]'. A request goes where its task is loaded, and waits there for others of the
same task. The form of requests is that of Hugging Face's inference API: POST /models/NAME, with the bytes of an image
or a WAV file, or JSON with `inputs`. The folders have to be at the same place on all nodes.

Examples:

  peanut-serve deploy --classify ./tasks-onnx --replicas 4

  peanut-serve deploy --classify ./tasks-onnx --replicas 2 --local --port 8000
"""


def deploy_classifiers(
    folders: Annotated[list[Path], typer.Option(OPTION, help="Folder of an ONNX export. Can be repeated.")],
    precision: Annotated[
        Precision, typer.Option("--precision", help="Precision of the graphs to run.")
    ] = Precision.FP32,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=10_000, help="Number of replicas.")] = 1,
    cpus: Annotated[
        float,
        typer.Option(
            "--cpus-per-replica",
            min=0,
            max=1024,
            callback=finite,
            help="CPUs of each replica, and threads of a run.",
        ),
    ] = 1.0,
    loaded: Annotated[
        int, typer.Option("--max-loaded", min=1, max=COUNT, help="Tasks that a replica keeps in memory.")
    ] = Tunables().loaded,
    batch_wait: Annotated[
        float,
        typer.Option(
            "--batch-wait",
            min=0,
            max=SECONDS,
            callback=finite,
            help="Seconds that an input waits for others of its task.",
        ),
    ] = Tunables().batch_wait,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting", min=1, max=COUNT, help="Inputs that a replica may have before 429 is answered."
        ),
    ] = Tunables().most_waiting,
    max_body: Annotated[str, typer.Option("--max-body", help="Maximum size of a request's body.")] = "16MiB",
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the API keys of clients, one per line.")
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option("--keys", help="File of the keys of many teams, with their tasks and limits."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", help="Address to listen on (default: 127.0.0.1; with --api-key-file, all of each node)."
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write Serve's config to.")] = Path(
        "classifiers.yaml"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file if it exists.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="Lines of Ray Serve's logs: text, or a JSON object each.")
    ] = LogFormat.TEXT,
    local: Annotated[
        bool, typer.Option("--local", help="Write nothing; serve on this machine until Ctrl-C or SIGTERM.")
    ] = False,
) -> None:
    """Check everything, then write Serve's config or serve on this machine. Raises `PeanutError`."""
    keys = api_key_file.expanduser().absolute() if api_key_file else None
    read_keys(keys)
    most_bytes = parse_size(max_body)
    if most_bytes is None:
        raise OptionError(f"--max-body is {max_body}; expected a size like 16MiB")
    settings = ClassifierSettings(
        folders=tuple(folder.expanduser().absolute() for folder in folders),
        precision=precision.value,
        replicas=replicas,
        cpus=cpus,
        key_file=keys,
        keys=keys_file.expanduser().absolute() if keys_file else None,
        most_bytes=most_bytes,
        log_format=log_format.value,
        tunables=Tunables(loaded=loaded, most_waiting=max_waiting, batch_wait=batch_wait),
    )
    settings.watched_keys()  # one that cannot be used is refused now
    _check(settings)
    deploy(settings, Target(host, port, output, overwrite, local))


def _check(settings: ClassifierSettings) -> None:
    """Compare the files of all tasks with their hashes. Raises `PeanutError`; no graph is loaded."""
    from peanut_serve.ray.classifiers.engines import open_engines

    hashes: dict[Path, str] = {}
    for name, engine in open_engines(settings).items():
        engine.tasks[name].check_files(settings.precision, hashes)
