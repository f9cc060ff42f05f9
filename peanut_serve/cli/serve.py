"""Starts a vLLM server with the options of `peanut-serve`."""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from converters.cli import console
from converters.errors import OptionError
from peanut_serve.cli.finding import Found, find_adapters, unserved, usable_names
from peanut_serve.cli.launch import (
    base_names,
    check_endpoints,
    option_names,
    run_vllm,
    server_variables,
    value_of,
    vllm_options,
)
from peanut_serve.settings.admin_key import KEY_VARIABLE, checked_key
from peanut_serve.settings.environment import CACHE, CACHE_SIZE, Settings
from peanut_serve.settings.hosts import is_loopback
from peanut_serve.settings.server import ServerSettings, server_settings
from peanut_serve.settings.serving import ServeOptions
from peanut_serve.signals.json_logs import LOGGING_PATH, LogLines, json_logging, use_json_logs, write_configuration
from peanut_serve.signals.tracing import OPTION, check_tracing
from peanut_serve.tenants.watched import keys_of
from peanut_serve.variants.roots import AdapterRoots
from peanut_serve.variants.state_folder import VariantStore
from peanut_serve.vllm_plugin.lora.cpu_experts import refuse_experts_on_cpu
from peanut_serve.web.audit import audit_log
from peanut_serve.web.bearer import read_keys


def serve(options: ServeOptions) -> None:
    """Run vLLM's server in this process until it is stopped; with `dry_run`, only show how it would be started.

    With `check`, only look for what is wrong.

    Raises `PeanutError` for anything that can be refused before vLLM starts, and `SystemExit` if a check finds
    something.
    """
    keys = _use_keys(options)
    logs = _json_logs(options) if options.log_format == "json" else None
    if logs is not None and not (options.check or options.dry_run):
        use_json_logs(logs)
        console.err.file = LogLines(logging.getLogger("peanut_serve"))
    found, arguments, settings = checked(options)
    if options.check:
        _check(options, found, arguments, settings)
        return
    keys_of(settings)  # a keys file that cannot be used is refused now
    variables = server_variables(settings)
    _note_open_address(arguments, keys)
    if settings.admin_port is not None and settings.certificate is None and not is_loopback(settings.admin_host):
        console.err.print(
            f"note: --admin-host {settings.admin_host} can be reached by others, and the key is sent in plain text; "
            "see --admin-ssl-certfile",
            markup=False,
        )
    if options.dry_run:
        _show(options, found, arguments)
        return
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None and "peanut_serve" not in allowed.split(","):
        raise OptionError(f"VLLM_PLUGINS is {allowed}, without peanut_serve; add it, or unset the variable")
    check_endpoints(options.allow_untested_vllm)
    if options.mode != "merged":
        refuse_experts_on_cpu(options.base)
    _refuse_unserved(options, found, settings)
    VariantStore(
        settings.state
    ).close()  # a folder that another server uses is refused now, not after the engine started
    if settings.admin_port is not None:
        audit_log(settings).close()
    if logs is not None:
        file = str(write_configuration(logs, settings.state))
        variables[LOGGING_PATH] = file
        # else uvicorn, which vLLM runs, gets its own configuration back
        arguments = [*arguments, "--logging-config", json.dumps({"pylogging_config_file": file})]
    os.environ.update(variables)  # the plugin reads them in this process and in vLLM's other processes
    # the list of this process's arguments, which others can see, does not change; vLLM hides them in its log
    run_vllm([*arguments, *(["--api-key", *keys] if keys else [])])


def _refuse_unserved(options: ServeOptions, found: Found, settings: ServerSettings) -> None:
    """Refuse now what would stop the server after its engine has started."""
    if not (settings.pin or settings.preload):
        return
    names = usable_names(found, options.mode, AdapterRoots(settings.roots), settings.state, options.base)
    names |= {*base_names(options.base, options.vllm)}
    for option, asked in (("pin", settings.pin), ("preload", settings.preload)):
        for name in asked:
            if name in found.broken and name not in names:
                raise OptionError(f"--{option} {name}: {found.broken[name]}")
        for reason in unserved({option: asked}, names):
            raise OptionError(reason)


def _use_keys(options: ServeOptions) -> list[str]:
    """The keys of clients that are in a file; the key of operators is put where the server reads it.

    Raises `OptionError` for a file without a key, for keys that are given in two ways, and for one that is both.
    """
    keys = read_keys(options.api_key_file)
    if keys and ("--api-key" in option_names(options.vllm) or os.environ.get("VLLM_API_KEY")):
        raise OptionError("there are keys in --api-key-file, and in --api-key or VLLM_API_KEY; give them once")
    if options.admin_key_file is None:
        return keys
    if os.environ.get(KEY_VARIABLE):
        raise OptionError(f"the admin key is in {options.admin_key_file} and in {KEY_VARIABLE}; give it once")
    admin_keys = read_keys(options.admin_key_file)
    if len(admin_keys) > 1:
        raise OptionError(f"{options.admin_key_file} has {len(admin_keys)} keys; expected one")
    if set(keys) & set(admin_keys):
        raise OptionError(f"the key in {options.admin_key_file} is also one of clients; give operators another")
    os.environ[KEY_VARIABLE] = checked_key(admin_keys[0], str(options.admin_key_file))
    return keys


def _json_logs(options: ServeOptions) -> dict[str, Any]:
    """The configuration of logging. Raises `OptionError` if vLLM has another one."""
    given = option_names(options.vllm)
    others = [one for one in sorted(given) if one.startswith(("--log-config-file", "--logging-config"))]
    others += [LOGGING_PATH] * (LOGGING_PATH in os.environ)
    if others:
        raise OptionError(f"--log-format json and {others[0]} are both given; leave one of them out")
    if os.environ.get("VLLM_CONFIGURE_LOGGING", "1") == "0":
        raise OptionError("--log-format json cannot be used with VLLM_CONFIGURE_LOGGING=0; unset the variable")
    if "--disable-access-log-for-endpoints" in given:
        raise OptionError("--disable-access-log-for-endpoints has no effect on JSON logs; leave it out")
    level = value_of(options.vllm, "--log-level") or os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
    return json_logging(level.upper(), os.environ.get("VLLM_LOGGING_STREAM", "ext://sys.stdout"))


def _note_open_address(arguments: Sequence[str], keys: Sequence[str]) -> None:
    if keys or "--api-key" in option_names(arguments) or os.environ.get("VLLM_API_KEY"):
        return
    host = value_of(arguments, "--host")
    if host is not None and not is_loopback(host):
        console.err.print(
            f"note: --host {host} can be reached by others, who need no key; see --api-key-file", markup=False
        )


def _check(options: ServeOptions, found: Found, arguments: Sequence[str], settings: ServerSettings) -> None:
    from peanut_serve.cli.checking import problems, show_problems

    wrong = list(problems(options, found, arguments, settings))
    _show(options, found, arguments)
    show_problems(wrong, len(found.names(options.mode)) + len(found.broken))
    if wrong:
        raise SystemExit(1)


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
    if OPTION in option_names(options.vllm):
        check_tracing()
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
