"""The options of `peanut-serve`, each as a parameter of its command is declared, and what several commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from converters.cli.numbers import COUNT, SECONDS, finite

_SECONDS: dict[str, Any] = {"min": 0, "max": SECONDS, "callback": finite}
_COUNT: dict[str, Any] = {"min": 1, "max": COUNT}


class Mode(str, Enum):
    """Of `--mode`."""

    LORA, MERGED, AUTO = "lora", "merged", "auto"


class Drain(str, Enum):
    """Of `--drain`."""

    WAIT, ABORT = "wait", "abort"


class BaseCopy(str, Enum):
    """Of `--base-copy`."""

    HOST, DISK, DEVICE = "host", "disk", "device"


class LogFormat(str, Enum):
    """Of `--log-format`."""

    TEXT, JSON = "text", "json"


class Precision(str, Enum):
    """Of the `--precision` of ONNX models."""

    FP32, FP16, INT8 = "fp32", "fp16", "int8"


class PrefixCache(str, Enum):
    """Of `--prefix-cache`."""

    RESET, SALTED = "reset", "salted"


def _configured(context: typer.Context, config: Path | None) -> Path | None:
    from peanut_serve.cli.configuration import use_configuration

    return use_configuration(context, config)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_configured,
        help="YAML file with these options; those of vLLM are below vllm:. PEANUT_... variables go before it.",
    ),
]
Base = Annotated[str, typer.Option("--base", help="Base model: folder, Hub id, llama2-7b, llama3-8b, qwen3-8b, ...")]
Adapters = Annotated[
    list[str], typer.Option("--adapters", help="Folder of adapters, or a Hub id to allow. Can be repeated.")
]
ModeOption = Annotated[Mode, typer.Option("--mode", help="How to serve variants.")]
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder for evaluated LoRA adapters.")]
CacheSize = Annotated[str | None, typer.Option("--cache-size", help="Maximum size of that folder (default: 20GB).")]
DrainOption = Annotated[Drain, typer.Option("--drain", help="Let a swap wait for running requests, or abort them.")]
DrainTimeout = Annotated[
    float,
    typer.Option(
        "--drain-timeout",
        **_SECONDS,
        help="Longest time a swap waits for running requests before it aborts them, in seconds.",
    ),
]
HostCache = Annotated[str, typer.Option("--host-cache", help="Maximum host memory for evaluated weights.")]
BaseCopyOption = Annotated[
    BaseCopy,
    typer.Option(
        "--base-copy",
        help="Where to keep the base weights for swapping back; with device, variants are evaluated there too.",
    ),
]
PackedCache = Annotated[
    str,
    typer.Option(
        "--packed-cache",
        help="On the CPU: maximum memory of each worker for layers as vLLM packed them; 0 to always pack anew.",
    ),
]
PrefixCacheOption = Annotated[
    PrefixCache,
    typer.Option("--prefix-cache", help="Reset vLLM's prefix cache at each swap, or salt it per variant."),
]
Pin = Annotated[
    list[str] | None, typer.Option("--pin", help="Keep this variant's weights in host memory. Can be repeated.")
]
Preload = Annotated[
    list[str] | None, typer.Option("--preload", help="Evaluate this variant at startup. Can be repeated.")
]
MaxWait = Annotated[
    float,
    typer.Option(
        "--max-wait", **_SECONDS, help="Longest time a request waits before its variant is swapped in, in seconds."
    ),
]
MinDwell = Annotated[
    float,
    typer.Option(
        "--min-dwell",
        **_SECONDS,
        help="Shortest time between swaps while the active variant has requests, in seconds.",
    ),
]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", **_COUNT, help="Maximum number of requests waiting for a swap.")
]
AdminPort = Annotated[
    int | None,
    typer.Option(
        "--admin-port", min=1, max=65535, help="Port of the admin API; its key is read from PEANUT_ADMIN_KEY."
    ),
]
AdminHost = Annotated[str, typer.Option("--admin-host", help="Address that the admin API listens on.")]
AdminCertificate = Annotated[
    Path | None,
    typer.Option("--admin-ssl-certfile", help="Certificate of the admin port (PEM), which then has TLS."),
]
AdminCertificateKey = Annotated[
    Path | None,
    typer.Option("--admin-ssl-keyfile", help="Key of that certificate (default: in the same file)."),
]
Console = Annotated[
    bool, typer.Option("--console/--no-console", help="Serve the console at /console of the admin port.")
]
ConsoleHost = Annotated[
    list[str] | None,
    typer.Option("--console-host", help="Name by which browsers reach the console. Can be repeated."),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the API keys of clients, one per line.")
]
AdminKeyFile = Annotated[
    Path | None, typer.Option("--admin-key-file", help="File with the key of the admin API (else PEANUT_ADMIN_KEY).")
]
Keys = Annotated[
    Path | None,
    typer.Option("--keys", help="File of the keys of many teams and operators, with their rights and limits."),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state", envvar="PEANUT_STATE", help="Folder for the state that survives a restart: names, versions, pins."
    ),
]
AuditLog = Annotated[
    Path | None,
    typer.Option(
        "--audit-log", help="File that gets a line for each change through the admin API (default: in --state)."
    ),
]
MaxEvaluations = Annotated[
    int, typer.Option("--max-evaluations", **_COUNT, help="Maximum number of adapters that wait to be evaluated.")
]
MaxBody = Annotated[str, typer.Option("--max-body", help="Maximum size of a request's body.")]
Stall = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        min=0.001,
        max=SECONDS,
        callback=finite,
        help="Longest time a client may read nothing of its response, in seconds.",
    ),
]
Settle = Annotated[
    float,
    typer.Option(
        "--settle", **_SECONDS, help="Time that files must not have changed for before they are served, in seconds."
    ),
]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="Lines of all logs: text, or a JSON object each.")
]
AllowUntested = Annotated[
    bool, typer.Option("--allow-untested-vllm", help="Start even if this version of vLLM was not tested.")
]
Check = Annotated[
    bool, typer.Option("--check", help="Check adapters, base, options and state, and exit: with 1 if one is wrong.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the adapters and vLLM's options, and exit.")]
