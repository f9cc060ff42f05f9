"""The command `peanut-serve`."""

import sys
from collections.abc import Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from converters.cli.flags import in_flags
from converters.cli.numbers import COUNT, SECONDS, finite
from converters.cli.options import Version
from converters.errors import PeanutError

if TYPE_CHECKING:
    from peanut_serve.settings.serving import ServeOptions

HELP = """Serve trained adapters (PEANuT, LoRA, other methods of PEFT) of one base by name, on vLLM's OpenAI server.

The field `model` of a request selects an adapter.

A folder given as --adapters contains one folder per adapter or merged model. They are evaluated on first use, and can
be added, replaced or removed while the server runs. Options that are not listed below are passed to vLLM (see
peanut-serve --vllm-help).

--mode lora (the default) serves many adapters in one batch. --mode merged swaps whole weights in and out: it adds no
cost per token, and serves what cannot be expressed as LoRA: heads, embeddings, DoRA, OFT and others, merged models.
--mode auto uses LoRA where possible.

Examples:

\b
  peanut-serve --base llama2-7b --adapters ./tasks
  peanut-serve --base ./smollm2 --adapters ./tasks --port 8001 --max-model-len 2048 --api-key SECRET
  peanut-serve --base ./smollm2 --adapters ./tasks --mode merged --host-cache 8GiB --admin-port 8001
  peanut-serve --config peanut.yaml --check
  peanut-serve ctl list
  peanut-serve size --base ./smollm2 --adapters ./tasks --gpu-memory 80GB
  peanut-serve state export --state ./state -o state.tar
  peanut-serve key search --variants 'math-*' --requests-per-minute 600
  peanut-serve deploy --base ./smollm2 --adapters ./tasks --replicas 4
  peanut-serve predict ./pets-onnx beagle.png
  peanut-serve classify ./pets-onnx --port 8080
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "gsm8k", "prompt": "6 times 7 is"}'
"""


# each has a module of its own, which is imported only if it is used; `deploy` reads the options of a server besides
_SUBCOMMANDS = ("ctl", "predict", "classify", "size", "state", "key")


_SECONDS: dict[str, Any] = {"min": 0, "max": SECONDS, "callback": finite}
_COUNT: dict[str, Any] = {"min": 1, "max": COUNT}


class _Mode(str, Enum):
    LORA, MERGED, AUTO = "lora", "merged", "auto"


class _Drain(str, Enum):
    WAIT, ABORT = "wait", "abort"


class _BaseCopy(str, Enum):
    HOST, DISK = "host", "disk"


class _LogFormat(str, Enum):
    TEXT, JSON = "text", "json"


class _PrefixCache(str, Enum):
    RESET, SALTED = "reset", "salted"


def _configured(context: typer.Context, config: Path | None) -> Path | None:
    from peanut_serve.cli.configuration import use_configuration

    return use_configuration(context, config)


_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_configured,
        help="YAML file with these options; those of vLLM are below vllm:. PEANUT_... variables go before it.",
    ),
]
_Base = Annotated[str, typer.Option("--base", help="Base model: folder, Hub id, llama2-7b, llama3-8b, qwen3-8b, ...")]
_Adapters = Annotated[
    list[str], typer.Option("--adapters", help="Folder of adapters, or a Hub id to allow. Can be repeated.")
]
_ModeOption = Annotated[_Mode, typer.Option("--mode", help="How to serve variants.")]
_Cache = Annotated[Path | None, typer.Option("--cache", help="Folder for evaluated LoRA adapters.")]
_CacheSize = Annotated[str | None, typer.Option("--cache-size", help="Maximum size of that folder (default: 20GB).")]
_DrainOption = Annotated[_Drain, typer.Option("--drain", help="Let a swap wait for running requests, or abort them.")]
_DrainTimeout = Annotated[
    float,
    typer.Option(
        "--drain-timeout",
        **_SECONDS,
        help="Longest time a swap waits for running requests before it aborts them, in seconds.",
    ),
]
_HostCache = Annotated[str, typer.Option("--host-cache", help="Maximum host memory for evaluated weights.")]
_BaseCopyOption = Annotated[
    _BaseCopy, typer.Option("--base-copy", help="Where to keep the base weights for swapping back.")
]
_PrefixCacheOption = Annotated[
    _PrefixCache,
    typer.Option("--prefix-cache", help="Reset vLLM's prefix cache at each swap, or salt it per variant."),
]
_Pin = Annotated[
    list[str] | None, typer.Option("--pin", help="Keep this variant's weights in host memory. Can be repeated.")
]
_Preload = Annotated[
    list[str] | None, typer.Option("--preload", help="Evaluate this variant at startup. Can be repeated.")
]
_MaxWait = Annotated[
    float,
    typer.Option(
        "--max-wait", **_SECONDS, help="Longest time a request waits before its variant is swapped in, in seconds."
    ),
]
_MinDwell = Annotated[
    float,
    typer.Option(
        "--min-dwell",
        **_SECONDS,
        help="Shortest time between swaps while the active variant has requests, in seconds.",
    ),
]
_Resident = Annotated[
    str | None,
    typer.Option(
        "--resident",
        help="With --mode auto: give this variant's merged weights to the engine, with others beside it as LoRA; "
        "auto: the busiest one's, as traffic decides.",
    ),
]
_Gather = Annotated[
    float,
    typer.Option(
        "--gather",
        min=0,
        max=SECONDS * 1000,
        callback=finite,
        help="Longest time a request waits for others that need LoRA beside the resident, too, in milliseconds.",
    ),
]
_MaxQueue = Annotated[
    int, typer.Option("--max-queue", **_COUNT, help="Maximum number of requests waiting for a swap.")
]
_AdminPort = Annotated[
    int | None,
    typer.Option(
        "--admin-port", min=1, max=65535, help="Port of the admin API; its key is read from PEANUT_ADMIN_KEY."
    ),
]
_AdminHost = Annotated[str, typer.Option("--admin-host", help="Address that the admin API listens on.")]
_AdminCertificate = Annotated[
    Path | None,
    typer.Option("--admin-ssl-certfile", help="Certificate of the admin port (PEM), which then has TLS."),
]
_AdminCertificateKey = Annotated[
    Path | None,
    typer.Option("--admin-ssl-keyfile", help="Key of that certificate (default: in the same file)."),
]
_Console = Annotated[
    bool, typer.Option("--console/--no-console", help="Serve the console at /console of the admin port.")
]
_ConsoleHost = Annotated[
    list[str] | None,
    typer.Option("--console-host", help="Name by which browsers reach the console. Can be repeated."),
]
_ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the API keys of clients, one per line.")
]
_AdminKeyFile = Annotated[
    Path | None, typer.Option("--admin-key-file", help="File with the key of the admin API (else PEANUT_ADMIN_KEY).")
]
_Keys = Annotated[
    Path | None,
    typer.Option("--keys", help="File of the keys of many teams and operators, with their rights and limits."),
]
_State = Annotated[
    Path | None,
    typer.Option(
        "--state", envvar="PEANUT_STATE", help="Folder for the state that survives a restart: names, versions, pins."
    ),
]
_AuditLog = Annotated[
    Path | None,
    typer.Option(
        "--audit-log", help="File that gets a line for each change through the admin API (default: in --state)."
    ),
]
_MaxEvaluations = Annotated[
    int, typer.Option("--max-evaluations", **_COUNT, help="Maximum number of adapters that wait to be evaluated.")
]
_MaxBody = Annotated[str, typer.Option("--max-body", help="Maximum size of a request's body.")]
_Stall = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        min=0.001,
        max=SECONDS,
        callback=finite,
        help="Longest time a client may read nothing of its response, in seconds.",
    ),
]
_Settle = Annotated[
    float,
    typer.Option(
        "--settle", **_SECONDS, help="Time that files must not have changed for before they are served, in seconds."
    ),
]
_LogFormatOption = Annotated[
    _LogFormat, typer.Option("--log-format", help="Lines of the log: text, or a JSON object each, vLLM's too.")
]
_AllowUntested = Annotated[
    bool, typer.Option("--allow-untested-vllm", help="Start even if this version of vLLM was not tested.")
]
_Check = Annotated[
    bool, typer.Option("--check", help="Check adapters, base, options and state, and exit: with 1 if one is wrong.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the adapters and vLLM's options, and exit.")]


def _serve(
    context: typer.Context,
    base: _Base,
    adapters: _Adapters,
    config: _Config = None,
    mode: _ModeOption = _Mode.LORA,
    cache: _Cache = None,
    cache_size: _CacheSize = None,
    drain: _DrainOption = _Drain.WAIT,
    drain_timeout: _DrainTimeout = 60.0,
    host_cache: _HostCache = "8GiB",
    base_copy: _BaseCopyOption = _BaseCopy.HOST,
    prefix_cache: _PrefixCacheOption = _PrefixCache.RESET,
    pin: _Pin = None,
    preload: _Preload = None,
    max_wait: _MaxWait = 10.0,
    min_dwell: _MinDwell = 0.5,
    resident: _Resident = None,
    gather: _Gather = 0.0,
    max_queue: _MaxQueue = 1024,
    max_evaluations: _MaxEvaluations = 64,
    max_body: _MaxBody = "64MiB",
    stall_timeout: _Stall = 30.0,
    settle: _Settle = 1.0,
    admin_port: _AdminPort = None,
    admin_host: _AdminHost = "127.0.0.1",
    admin_ssl_certfile: _AdminCertificate = None,
    admin_ssl_keyfile: _AdminCertificateKey = None,
    console: _Console = True,
    console_host: _ConsoleHost = None,
    audit_log: _AuditLog = None,
    admin_key_file: _AdminKeyFile = None,
    api_key_file: _ApiKeyFile = None,
    keys: _Keys = None,
    state: _State = None,
    log_format: _LogFormatOption = _LogFormat.TEXT,
    allow_untested_vllm: _AllowUntested = False,
    check: _Check = False,
    dry_run: _DryRun = False,
    version: Version = False,
) -> None:
    from peanut_serve.cli.configuration import with_vllm_options
    from peanut_serve.cli.serve import serve
    from peanut_serve.settings.serving import ServeOptions

    serving = {
        "state": state, "drain": drain.value, "drain_timeout": drain_timeout, "host_cache": host_cache,
        "base_copy": base_copy.value, "prefix_cache": prefix_cache.value, "pin": pin or (), "preload": preload or (),
        "max_wait": max_wait, "min_dwell": min_dwell, "max_queue": max_queue, "admin_port": admin_port,
        "admin_host": admin_host, "audit_log": audit_log, "max_evaluations": max_evaluations, "max_body": max_body,
        "stall_timeout": stall_timeout, "settle": settle, "console": console, "console_host": console_host or (),
        "keys": keys, "resident": resident, "gather": gather,
        "admin_ssl_certfile": admin_ssl_certfile, "admin_ssl_keyfile": admin_ssl_keyfile,
    }  # fmt: skip
    options = ServeOptions(
        base,
        tuple(adapters),
        mode.value,
        cache,
        cache_size,
        serving,
        dry_run,
        tuple(with_vllm_options(context)),
        allow_untested_vllm,
        check,
        api_key_file,
        admin_key_file,
        log_format.value,
    )
    (context.obj or serve)(options)


def _command() -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    pass_through = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name="peanut-serve", help=HELP, context_settings=pass_through)(_serve)
    return app


def _read_options(arguments: Sequence[str]) -> "ServeOptions":
    """The options of a server, for a command that starts it elsewhere."""
    found: list[ServeOptions] = []
    _command()(list(arguments), prog_name="peanut-serve", standalone_mode=False, obj=found.append)
    return found[0]


def main() -> NoReturn:
    """Entry point of `peanut-serve`: an error is one line on stderr and exit code 1."""
    if sys.argv[1:2] and sys.argv[1] in _SUBCOMMANDS:
        import_module(f"peanut_serve.cli.{sys.argv[1]}_command").main(sys.argv[2:])
    if sys.argv[1:2] == ["deploy"]:
        from peanut_serve.cli.deploy_command import main as deploy

        deploy(sys.argv[2:], _read_options)
    if "--vllm-help" in sys.argv:
        from peanut_serve.cli.launch import run_vllm

        run_vllm(["--help=all"])
    try:
        _command()(prog_name="peanut-serve")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
