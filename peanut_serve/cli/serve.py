"""Starts a vLLM server with the options of `peanut-serve`."""

import os
from collections.abc import Sequence

from converters.cli import console
from converters.errors import OptionError
from peanut_serve.cli.launch import (
    Found,
    base_names,
    check_endpoints,
    find_adapters,
    run_vllm,
    server_variables,
    vllm_options,
)
from peanut_serve.settings.environment import CACHE, CACHE_SIZE, Settings
from peanut_serve.settings.server import ServerSettings, server_settings
from peanut_serve.settings.serving import ServeOptions
from peanut_serve.variants.roots import AdapterRoots
from peanut_serve.variants.state_folder import VariantStore
from peanut_serve.vllm_plugin.lora.cpu_experts import refuse_experts_on_cpu
from peanut_serve.web.audit import audit_log


def serve(options: ServeOptions) -> None:
    """Run vLLM's server in this process until it is stopped; with `dry_run`, only show how it would be started.

    Raises `PeanutError` for anything that can be refused before vLLM starts.
    """
    found, arguments, settings = checked(options)
    variables = server_variables(settings)
    if options.dry_run:
        _show(options, found, arguments)
        return
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None and "peanut_serve" not in allowed.split(","):
        raise OptionError(f"VLLM_PLUGINS is {allowed}, without peanut_serve; add it, or unset the variable")
    check_endpoints(options.allow_untested_vllm)
    if options.mode != "merged":
        refuse_experts_on_cpu(options.base)
    VariantStore(
        settings.state
    ).close()  # a folder that another server uses is refused now, not after the engine started
    if settings.admin_port is not None:
        audit_log(settings).close()
    os.environ.update(variables)  # the plugin reads them in this process and in vLLM's other processes
    run_vllm(arguments)


def checked(options: ServeOptions) -> tuple[Found, list[str], ServerSettings]:
    """Open the adapters and check the options: what was found, the options of vLLM, and the settings.

    Notes for the operator are printed. Raises `PeanutError`.
    """
    roots = AdapterRoots(options.adapters)
    names = [*map(str, roots.folders), *roots.hub_ids]
    found = find_adapters(roots)
    for note in found.notes(options.mode):
        console.err.print(f"note: {note}", markup=False)
    for name in sorted(set(base_names(options.base, options.vllm)) & set(found.names(options.mode))):
        console.err.print(f"note: {name} will not be served: the base has this name", markup=False)
    arguments = vllm_options(options.base, options.mode, found, options.vllm)
    return found, arguments, _settings(options, names)


def _show(options: ServeOptions, found: Found, arguments: Sequence[str]) -> None:
    console.out.print(f"variants: {', '.join(found.names(options.mode)) or 'none'}", markup=False)
    console.out.print(f"vllm serve {' '.join(arguments)}", markup=False)


def _settings(options: ServeOptions, roots: Sequence[str]) -> ServerSettings:
    given = {} if options.cache is None else {CACHE: str(options.cache.expanduser().resolve())}
    if options.cache_size is not None:
        given[CACHE_SIZE] = options.cache_size
    found = Settings.read({**os.environ, **given})  # refuses an invalid size
    return server_settings(
        options.base,
        mode=options.mode,
        roots=roots,
        cache=found.cache,
        cache_bytes=found.cache_bytes,
        device=found.device,
        **options.serving,
    )
