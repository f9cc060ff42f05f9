"""The environment of vLLM's processes: the settings of the server, and what vLLM needs to load the plugin."""

import hashlib
import os
from collections.abc import Mapping
from importlib.metadata import entry_points

from peanut_serve.settings.environment import STATE, Settings
from peanut_serve.settings.server import VARIABLE, ServerSettings, default_state

_ENDPOINTS = "peanut_serve_variants"
# seconds; vLLM's own 5 are also those of OpenAI's client, so that now and then one of the two closes a connection
# just when the other uses it. Reverse proxies keep theirs for 60
_KEEP_ALIVE = "75"
_PLUGIN_GROUPS = tuple(f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger"))


def engine_variables(settings: ServerSettings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment that vLLM's processes need to serve variants."""
    named = environment.get("VLLM_PLUGINS")
    # vLLM loads an endpoint plugin only if VLLM_PLUGINS names it, and then loads no plugin that is not named
    plugins = named.split(",") if named is not None else _installed_plugins()
    return {
        VARIABLE: settings.model_dump_json(),
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, _ENDPOINTS])),
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": environment.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", _KEEP_ALIVE),
        # the engine may have to be restarted from a process with threads, which cannot fork safely
        "VLLM_WORKER_MULTIPROC_METHOD": environment.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
    }


def variables_of_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The same for `vllm serve`, from PEANUT_ADAPTERS and the other variables. Raises `OptionError`."""
    found = Settings.read(environment)
    roots = hashlib.sha256(os.pathsep.join(found.roots).encode()).hexdigest()
    state = environment.get(STATE)
    settings = ServerSettings.model_validate(
        {
            "mode": "lora",
            "roots": found.roots,
            "state": state or default_state(roots),
            "device": found.device,
            "cache": found.cache,
            "cache_bytes": found.cache_bytes,
        }
    )
    return engine_variables(settings, environment)


def _installed_plugins() -> list[str]:
    return sorted({point.name for group in _PLUGIN_GROUPS for point in entry_points(group=group)})
