"""The command `peanut-serve`."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from converters.cli_options import Version
from converters.errors import OptionError, PeanutError

HELP = """Serve PEANuT adapters of one base by name, on vLLM's own OpenAI server: `model` in a request picks one.

DIR holds an adapter per folder. It is evaluated when it is first asked for, and may be added, replaced or
removed while the server runs. Every option that is not below is vLLM's (see: peanut-serve --vllm-help).

Examples:

  peanut-serve --base llama2-7b --adapters ./tasks

  peanut-serve --base ./smollm2 --adapters ./tasks --port 8001 --max-model-len 2048 --api-key SECRET

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "gsm8k", "prompt": "6 times 7 is"}'
"""


def _serve(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Folder, Hub id, llama2-7b, llama3-8b, qwen3-8b, ...")],
    adapters: Annotated[
        list[str], typer.Option("--adapters", help="Folder of adapters, or a Hub id that is allowed; again for more.")
    ],
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder for what was evaluated.")] = None,
    cache_size: Annotated[str | None, typer.Option("--cache-size", help="Like 20GB, the default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the adapters and vLLM's options only.")] = False,
    version: Version = False,
) -> None:
    from converters import console
    from peanut_serve import settings
    from peanut_serve.adapter_roots import AdapterRoots
    from peanut_serve.launch_options import find_adapters, run_vllm, vllm_options

    roots = AdapterRoots(adapters)
    found = find_adapters(roots)
    for name, reason in found.broken.items():
        console.err.print(f"note: {name} will not be served: {reason}", markup=False)
    if not found.ranks:
        console.err.print("note: there are no adapters yet; vLLM starts with room for rank 16", markup=False)
    options = vllm_options(base, found, context.args)
    if dry_run:
        console.out.print(f"adapters: {', '.join(found.ranks) or 'none'}", markup=False)
        console.out.print(f"vllm serve {' '.join(options)}", markup=False)
        return
    variables = {settings.ADAPTERS: os.pathsep.join([*map(str, roots.folders), *roots.hub_ids])}
    if cache is not None:
        variables[settings.CACHE] = str(cache.expanduser().resolve())
    if cache_size is not None:
        variables[settings.CACHE_SIZE] = cache_size
    settings.Settings.read({**os.environ, **variables})  # refuses a size that is none
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None and "peanut_serve" not in allowed.split(","):
        raise OptionError(f"VLLM_PLUGINS is {allowed}, without peanut_serve; add it, or unset the variable")
    os.environ.update(variables)  # where the plugin looks, in this process and in vLLM's others
    run_vllm(options)


def main() -> NoReturn:
    """Entry point of `peanut-serve`: a refusal is one line on stderr and exit code 1."""
    if "--vllm-help" in sys.argv:
        from peanut_serve.launch_options import run_vllm

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
