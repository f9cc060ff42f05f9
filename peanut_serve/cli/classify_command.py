"""The command `peanut-serve classify`: serves the tasks of ONNX folders over HTTP."""

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from converters.cli.flags import in_flags
from converters.cli.numbers import COUNT, SECONDS, finite
from converters.errors import OptionError, PeanutError
from converters.serving import parse_size
from peanut_serve.cli import server_options as options
from peanut_serve.cli.configuration import use_own_configuration
from peanut_serve.settings.admin_key import KEY_VARIABLE

if TYPE_CHECKING:
    from peanut_serve.settings.tls import Certificate

HELP = """Serve ONNX models that `peanut-merge --format onnx` wrote over HTTP, on ONNX Runtime.

FOLDER is an export, or a folder whose subfolders are exports; these can be added or replaced while the server runs.
The name of a task is that of its adapter, or of its folder if the export has one task. NAME:int8 and NAME:fp16 are
the same task as --quantize wrote it.

Clients use the inference protocol of Hugging Face (POST /models/NAME) or the Open Inference Protocol of KServe and
Triton (/v2/models/NAME/infer). /openapi.json describes both.

With a key in the environment variable PEANUT_ADMIN_KEY, or one with the role admin or read-only in --keys, there is a
console at /console, on which people see and change what is open. It needs the extra `console`.

Examples:

\b
  peanut-serve classify ./pets-onnx
  peanut-serve classify ./tasks-onnx ./sentiment-onnx --port 9000 --memory 8GiB
  peanut-serve classify ./tasks-onnx --host 0.0.0.0 --api-key-file keys.txt
  peanut-serve classify ./tasks-onnx --max-batch 16 --max-delay 5 --threads 4
  peanut-serve classify ./tasks-onnx --dry-run
  peanut-serve classify --config classify.yaml
  curl http://127.0.0.1:8080/models/pets-onnx -H 'Content-Type: image/png' --data-binary @beagle.png
  curl http://127.0.0.1:8080/models/sentiment-onnx -H 'Content-Type: application/json' \\
    -d '{"inputs": "A well executed spy thriller."}'
"""


_Folders = Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="ONNX exports, or folders of them.")]
_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=use_own_configuration,
        help="YAML file with these options; PEANUT_... variables go before it.",
    ),
]
_Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
_Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for a free one.")]
_ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="PEANUT_API_KEY",
        help="Key of a client. Can be repeated. Others can see it in the list of processes.",
    ),
]
_Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        envvar="PEANUT_KEYS",
        help="File of the keys of many teams, with their rights and limits; see peanut-serve key.",
    ),
]
_Certificate = Annotated[
    Path | None, typer.Option("--ssl-certfile", help="Certificate (PEM) of the address, which then has TLS.")
]
_CertificateKey = Annotated[
    Path | None, typer.Option("--ssl-keyfile", help="Key of that certificate (default: in the same file).")
]
_Precision = Annotated[
    options.Precision, typer.Option("--precision", help="Precision of the graphs that a name stands for.")
]
_Memory = Annotated[str, typer.Option("--memory", help="Maximum size of the graphs and adapters that are open.")]
_MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, max=1024, help="Maximum inputs of one run.")]
_MaxDelay = Annotated[
    float,
    typer.Option(
        "--max-delay",
        min=0,
        max=1000,
        callback=finite,
        help="Longest time an input waits for others, in milliseconds.",
    ),
]
_MaxQueue = Annotated[
    int,
    typer.Option("--max-queue", min=1, max=COUNT, help="Maximum number of inputs that wait; then 429 is answered."),
]
_MaxInputs = Annotated[int, typer.Option("--max-inputs", min=1, max=COUNT, help="Maximum inputs of one request.")]
_MaxPixels = Annotated[
    int, typer.Option("--max-pixels", min=1, max=89_000_000, help="Maximum pixels of an image, before it is decoded.")
]
_Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=1,
        max=SECONDS,
        callback=finite,
        help="Longest time a request waits for its answer, in seconds.",
    ),
]
_Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="Number of threads of a run (default: all cores).")
]
_ConsoleHost = Annotated[
    list[str] | None,
    typer.Option(
        "--console-host",
        help="Name by which browsers reach the console, besides loopback and addresses. Can be repeated.",
    ),
]
_AuditFile = Annotated[
    Path | None,
    typer.Option(
        "--audit-log",
        envvar="PEANUT_AUDIT_LOG",
        help="File that gets a line for each action on the console (default: only the log).",
    ),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Open and check every task, show its digest, and exit.")]


def _classify(
    folders: _Folders,
    config: _Config = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8080,
    api_key: _ApiKey = None,
    api_key_file: options.ApiKeyFile = None,
    keys: _Keys = None,
    ssl_certfile: _Certificate = None,
    ssl_keyfile: _CertificateKey = None,
    precision: _Precision = options.Precision.FP32,
    memory: _Memory = "4GiB",
    max_batch: _MaxBatch = 8,
    max_delay: _MaxDelay = 2.0,
    max_queue: _MaxQueue = 256,
    max_inputs: _MaxInputs = 64,
    max_body: options.MaxBody = "16MiB",
    max_pixels: _MaxPixels = 40_000_000,
    timeout: _Timeout = 60.0,
    threads: _Threads = None,
    console_host: _ConsoleHost = None,
    audit_log: _AuditFile = None,
    log_format: options.LogFormatOption = options.LogFormat.TEXT,
    dry_run: _DryRun = False,
) -> None:
    from peanut_serve.classify.http.console import TaskConsole
    from peanut_serve.classify.http.door import CLIENTS
    from peanut_serve.classify.http.serving import check, check_host, serve
    from peanut_serve.classify.serving.limits import Limits
    from peanut_serve.classify.serving.server import TaskServer
    from peanut_serve.signals.json_logs import json_logging, use_json_logs
    from peanut_serve.tenants.visits import Tenants
    from peanut_serve.tenants.watched import WatchedKeys
    from peanut_serve.web.audit import AuditLog
    from peanut_serve.web.bearer import read_keys
    from peanut_serve.web.operators import Operators

    limits = Limits(
        max_batch=max_batch,
        max_delay=max_delay / 1000,
        max_queue=max_queue,
        max_inputs=min(max_inputs, max_queue),
        max_pixels=max_pixels,
        wait_seconds=timeout,
        memory=_size("--memory", memory),
        threads=threads,
    )
    clients = replace(CLIENTS, body_bytes=_size("--max-body", max_body))
    own = [*(api_key or []), *read_keys(api_key_file)]
    if not all(key and key.isprintable() and " " not in key for key in own):
        raise OptionError("an API key is empty, or has spaces or control characters; a header cannot contain it")
    check_host(host, bool(own) or keys is not None)
    certificate = _certificate(ssl_certfile, ssl_keyfile)
    watched = None if keys is None else WatchedKeys(keys)
    tenants = None if watched is None else Tenants(watched, max_queue)
    if log_format is options.LogFormat.JSON:
        use_json_logs(json_logging(stream="ext://sys.stderr"))
    else:
        logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
        for name in ("peanut_serve", "vllm.peanut_serve"):  # the latter: shared with servers of variants
            logging.getLogger(name).setLevel(logging.INFO)
    tasks = TaskServer(folders, precision=precision.value, limits=limits)
    if dry_run:
        check(tasks)
        return
    admin = os.environ.get(KEY_VARIABLE)
    if admin in own:
        raise OptionError(f"the key in {KEY_VARIABLE} is also an API key; clients must not have that of operators")
    has_console = bool(admin) or (watched is not None and watched.has_operators)
    if audit_log is not None and not has_console:
        raise OptionError(
            f"--audit-log is for the console, which is off; set {KEY_VARIABLE}, or give a key in --keys the role "
            "admin"
        )
    console = None
    if has_console:
        log = AuditLog(audit_log.expanduser()) if audit_log is not None else None
        operators = Operators([admin] if admin else [], watched)
        console = TaskConsole(operators, port, tuple(console_host or ()), log)
    serve(tasks, host, port, own, clients, console, tenants, certificate)


def _certificate(certfile: Path | None, keyfile: Path | None) -> "Certificate | None":
    from peanut_serve.settings.tls import Certificate

    if certfile is None:
        if keyfile is not None:
            raise OptionError("--ssl-keyfile is given without --ssl-certfile; give both")
        return None
    certificate = Certificate(certfile.expanduser(), keyfile.expanduser() if keyfile else None, "--ssl-certfile")
    certificate.check()
    return certificate


def _size(option: str, text: str) -> int:
    size = parse_size(text)
    if size is None or size < 1:
        raise OptionError(f"{option} is {text}; expected a size like 4GiB")
    return size


def _command() -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name="classify", help=HELP)(_classify)
    return app


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve classify` with these arguments: an error is one line on stderr and exit code 1."""
    try:
        _command()(argv, prog_name="peanut-serve classify")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve classify: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
