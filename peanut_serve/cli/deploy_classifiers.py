"""`peanut-serve deploy --classify FOLDER`: classifiers of ONNX exports behind one address, on Ray Serve."""

from pathlib import Path
from typing import Annotated

import typer

from converters.cli.numbers import COUNT, SECONDS, finite
from converters.errors import OptionError
from converters.serving import parse_size
from peanut_serve.cli import fleet_options as fleet
from peanut_serve.cli import server_options as options
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


_DEFAULT = Tunables()
_Folders = Annotated[list[Path], typer.Option(OPTION, help="Folder of an ONNX export. Can be repeated.")]
_Precision = Annotated[options.Precision, typer.Option("--precision", help="Precision of the graphs to run.")]
_Loaded = Annotated[int, typer.Option("--max-loaded", min=1, max=COUNT, help="Tasks that a replica keeps in memory.")]
_BatchWait = Annotated[
    float,
    typer.Option(
        "--batch-wait",
        min=0,
        max=SECONDS,
        callback=finite,
        help="Seconds that an input waits for others of its task.",
    ),
]


def deploy_classifiers(
    folders: _Folders,
    precision: _Precision = options.Precision.FP32,
    replicas: fleet.Replicas = 1,
    cpus: fleet.Cpus = 1.0,
    loaded: _Loaded = _DEFAULT.loaded,
    batch_wait: _BatchWait = _DEFAULT.batch_wait,
    max_waiting: fleet.MaxWaiting = _DEFAULT.most_waiting,
    max_body: options.MaxBody = "16MiB",
    api_key_file: options.ApiKeyFile = None,
    keys_file: options.Keys = None,
    host: fleet.Host = None,
    port: fleet.Port = 8000,
    output: fleet.Output = Path("classifiers.yaml"),
    overwrite: fleet.Overwrite = False,
    log_format: options.LogFormatOption = options.LogFormat.TEXT,
    local: fleet.Local = False,
) -> None:
    """Check everything, then write Serve's config or serve on this machine. Raises `PeanutError`."""
    keys = fleet.absolute(api_key_file)
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
        keys=fleet.absolute(keys_file),
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
