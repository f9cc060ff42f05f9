"""The command `peanut-serve`."""

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from converters.cli.options import Version
from converters.errors import OptionError, PeanutError

HELP = """Serve PEANuT adapters of one base by name, on vLLM's own OpenAI server: `model` in a request picks one.

DIR holds an adapter per folder, or a merged model. It is evaluated when it is first asked for, and may be added,
replaced or removed while the server runs. Every option that is not below is vLLM's (peanut-serve --vllm-help).

--mode lora (the default) answers many adapters in one batch. --mode merged swaps whole weights in and out: that costs
nothing per token, and serves what LoRA cannot: heads, embeddings, merged models. --mode auto takes LoRA where it can.

Examples:

\b
  peanut-serve --base llama2-7b --adapters ./tasks
  peanut-serve --base ./smollm2 --adapters ./tasks --port 8001 --max-model-len 2048 --api-key SECRET
  peanut-serve --base ./smollm2 --adapters ./tasks --mode merged --host-cache 8GiB --admin-port 8001
  peanut-serve ctl list
  peanut-serve predict ./pets-onnx beagle.png
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "gsm8k", "prompt": "6 times 7 is"}'
"""


class _Mode(str, Enum):
    LORA, MERGED, AUTO = "lora", "merged", "auto"


class _Drain(str, Enum):
    WAIT, ABORT = "wait", "abort"


class _BaseCopy(str, Enum):
    HOST, DISK = "host", "disk"


class _PrefixCache(str, Enum):
    RESET, SALTED = "reset", "salted"


_SWAPPING = "With --mode merged or auto"


def _serve(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Folder, Hub id, llama2-7b, llama3-8b, qwen3-8b, ...")],
    adapters: Annotated[
        list[str], typer.Option("--adapters", help="Folder of adapters, or a Hub id that is allowed; again for more.")
    ],
    mode: Annotated[_Mode, typer.Option("--mode", help="How variants are served.")] = _Mode.LORA,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder for evaluated LoRA adapters.")] = None,
    cache_size: Annotated[str | None, typer.Option("--cache-size", help="Like 20GB, the default.")] = None,
    drain: Annotated[
        _Drain, typer.Option("--drain", help="Whether a swap waits for running requests, or ends them.")
    ] = _Drain.WAIT,
    drain_timeout: Annotated[float, typer.Option("--drain-timeout", help="Seconds it waits at most.")] = 60.0,
    host_cache: Annotated[str, typer.Option("--host-cache", help="Memory for evaluated weights.")] = "8GiB",
    base_copy: Annotated[
        _BaseCopy, typer.Option("--base-copy", help="Where base weights come from to swap back.")
    ] = _BaseCopy.HOST,
    prefix_cache: Annotated[
        _PrefixCache, typer.Option("--prefix-cache", help="Emptied at a swap, or kept for each variant.")
    ] = _PrefixCache.RESET,
    pin: Annotated[
        list[str] | None, typer.Option("--pin", help="Keep this variant's weights in memory; again for more.")
    ] = None,
    preload: Annotated[
        list[str] | None, typer.Option("--preload", help="Evaluate this variant at the start; again for more.")
    ] = None,
    max_wait: Annotated[float, typer.Option("--max-wait", help="Seconds until a request's variant is next.")] = 10.0,
    min_dwell: Annotated[
        float, typer.Option("--min-dwell", help="Seconds a variant in use keeps the weights.")
    ] = 0.5,
    max_queue: Annotated[int, typer.Option("--max-queue", help="Requests that may wait for a swap.")] = 1024,
    admin_port: Annotated[
        int | None, typer.Option("--admin-port", help="Port of the admin API; its key is in PEANUT_ADMIN_KEY.")
    ] = None,
    admin_host: Annotated[str, typer.Option("--admin-host", help="Where the admin API listens.")] = "127.0.0.1",
    state: Annotated[
        Path | None, typer.Option("--state", help="Folder of what survives a restart: names, versions, pins.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the adapters and vLLM's options only.")] = False,
    version: Version = False,
) -> None:
    from converters.cli import console
    from peanut_serve.cli.launch import check_endpoints, find_adapters, run_vllm, swap_variables, vllm_options
    from peanut_serve.settings import environment as settings
    from peanut_serve.settings.swapping import swap_settings
    from peanut_serve.variants.roots import AdapterRoots

    roots = AdapterRoots(adapters)
    names = [*map(str, roots.folders), *roots.hub_ids]
    found = find_adapters(roots)
    for note in found.notes(mode.value):
        console.err.print(f"note: {note}", markup=False)
    options = vllm_options(base, mode.value, found, context.args)
    variables: dict[str, str] = {}
    if mode is not _Mode.LORA:
        swapping = swap_settings(
            base, mode=mode.value, roots=names, state=state, drain=drain.value, drain_timeout=drain_timeout,
            host_cache=host_cache, base_copy=base_copy.value, prefix_cache=prefix_cache.value, pin=pin or (),
            preload=preload or (), max_wait=max_wait, min_dwell=min_dwell, max_queue=max_queue,
            admin_port=admin_port, admin_host=admin_host,
        )  # fmt: skip
        variables |= swap_variables(swapping)
    if dry_run:
        console.out.print(f"variants: {', '.join(found.names(mode.value)) or 'none'}", markup=False)
        console.out.print(f"vllm serve {' '.join(options)}", markup=False)
        return
    # empty, whatever the environment has: no name is to be found as LoRA as well
    variables[settings.ADAPTERS] = os.pathsep.join(names) if mode is not _Mode.MERGED else ""
    if cache is not None:
        variables[settings.CACHE] = str(cache.expanduser().resolve())
    if cache_size is not None:
        variables[settings.CACHE_SIZE] = cache_size
    settings.Settings.read({**os.environ, **variables})  # refuses a size that is none
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None and "peanut_serve" not in allowed.split(","):
        raise OptionError(f"VLLM_PLUGINS is {allowed}, without peanut_serve; add it, or unset the variable")
    if mode is not _Mode.LORA:
        check_endpoints()
    os.environ.update(variables)  # where the plugin looks, in this process and in vLLM's others
    run_vllm(options)


def main() -> NoReturn:
    """Entry point of `peanut-serve`: a refusal is one line on stderr and exit code 1."""
    if sys.argv[1:2] == ["ctl"]:
        from peanut_serve.cli.ctl_command import main as ctl

        ctl(sys.argv[2:])
    if sys.argv[1:2] == ["predict"]:
        from peanut_serve.cli.predict_command import main as predict

        predict(sys.argv[2:])
    if "--vllm-help" in sys.argv:
        from peanut_serve.cli.launch import run_vllm

        run_vllm(["--help=all"])
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    passing = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name="peanut-serve", help=HELP, context_settings=passing)(_serve)
    try:
        app(prog_name="peanut-serve")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
