"""Starts a vLLM server with the options of `peanut-serve`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from converters.cli import console
from converters.errors import OptionError
from peanut_serve.cli.launch import Found, check_endpoints, find_adapters, run_vllm, swap_variables, vllm_options
from peanut_serve.settings.environment import ADAPTERS, CACHE, CACHE_SIZE, Settings
from peanut_serve.settings.serving import ServeOptions
from peanut_serve.settings.swapping import swap_settings
from peanut_serve.variants.roots import AdapterRoots


def serve(options: ServeOptions) -> None:
    """Run vLLM's server in this process until it is stopped; with `dry_run`, only show how it would be started.

    Raises `PeanutError` for anything that can be refused before vLLM starts.
    """
    roots = AdapterRoots(options.adapters)
    names = [*map(str, roots.folders), *roots.hub_ids]
    found = find_adapters(roots)
    for note in found.notes(options.mode):
        console.err.print(f"note: {note}", markup=False)
    arguments = vllm_options(options.base, options.mode, found, options.vllm)
    swapping = {} if options.mode == "lora" else _swap_variables(options, names)
    if options.dry_run:
        _show(options, found, arguments)
        return
    variables = {**swapping, **_lora_variables(options, names)}
    Settings.read({**os.environ, **variables})  # refuses an invalid size
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None and "peanut_serve" not in allowed.split(","):
        raise OptionError(f"VLLM_PLUGINS is {allowed}, without peanut_serve; add it, or unset the variable")
    if options.mode != "lora":
        check_endpoints()
    os.environ.update(variables)  # the plugin reads them in this process and in vLLM's other processes
    run_vllm(arguments)


def _show(options: ServeOptions, found: Found, arguments: Sequence[str]) -> None:
    console.out.print(f"variants: {', '.join(found.names(options.mode)) or 'none'}", markup=False)
    console.out.print(f"vllm serve {' '.join(arguments)}", markup=False)


def _swap_variables(options: ServeOptions, roots: Sequence[str]) -> dict[str, str]:
    given: Mapping[str, Any] = options.swapping
    return swap_variables(swap_settings(options.base, mode=options.mode, roots=roots, **given))


def _lora_variables(options: ServeOptions, roots: Sequence[str]) -> dict[str, str]:
    # empty with --mode merged, even if the environment sets it: no name may also be served as LoRA
    variables = {ADAPTERS: os.pathsep.join(roots) if options.mode != "merged" else ""}
    if options.cache is not None:
        variables[CACHE] = str(options.cache.expanduser().resolve())
    if options.cache_size is not None:
        variables[CACHE_SIZE] = options.cache_size
    return variables
