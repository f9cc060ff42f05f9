"""The command `peanut-serve`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

import typer

from converters.cli.flags import in_flags
from converters.cli.options import Version
from converters.errors import PeanutError
from peanut_serve.cli import server_options as options

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
_SUBCOMMANDS = {
    "ctl": "peanut_serve.cli.ctl.command",
    **{name: f"peanut_serve.cli.{name}_command" for name in ("predict", "classify", "size", "state", "key")},
}


def _serve(
    context: typer.Context,
    base: options.Base,
    adapters: options.Adapters,
    config: options.Config = None,
    mode: options.ModeOption = options.Mode.LORA,
    cache: options.Cache = None,
    cache_size: options.CacheSize = None,
    drain: options.DrainOption = options.Drain.WAIT,
    drain_timeout: options.DrainTimeout = 60.0,
    host_cache: options.HostCache = "8GiB",
    base_copy: options.BaseCopyOption = options.BaseCopy.HOST,
    packed_cache: options.PackedCache = "1GiB",
    prefix_cache: options.PrefixCacheOption = options.PrefixCache.RESET,
    pin: options.Pin = None,
    preload: options.Preload = None,
    max_wait: options.MaxWait = 10.0,
    min_dwell: options.MinDwell = 0.5,
    max_queue: options.MaxQueue = 1024,
    max_evaluations: options.MaxEvaluations = 64,
    max_body: options.MaxBody = "64MiB",
    stall_timeout: options.Stall = 30.0,
    settle: options.Settle = 1.0,
    admin_port: options.AdminPort = None,
    admin_host: options.AdminHost = "127.0.0.1",
    admin_ssl_certfile: options.AdminCertificate = None,
    admin_ssl_keyfile: options.AdminCertificateKey = None,
    console: options.Console = True,
    console_host: options.ConsoleHost = None,
    audit_log: options.AuditLog = None,
    admin_key_file: options.AdminKeyFile = None,
    api_key_file: options.ApiKeyFile = None,
    keys: options.Keys = None,
    state: options.State = None,
    log_format: options.LogFormatOption = options.LogFormat.TEXT,
    allow_untested_vllm: options.AllowUntested = False,
    check: options.Check = False,
    dry_run: options.DryRun = False,
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
        "keys": keys, "packed_cache": packed_cache,
        "admin_ssl_certfile": admin_ssl_certfile, "admin_ssl_keyfile": admin_ssl_keyfile,
    }  # fmt: skip
    asked = ServeOptions(
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
    (context.obj or serve)(asked)


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
        import_module(_SUBCOMMANDS[sys.argv[1]]).main(sys.argv[2:])
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
