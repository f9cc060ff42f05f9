"""The vLLM plugin; `register` is its entry point."""

import logging
import multiprocessing
import os

from peanut_serve.settings.environment import ADAPTERS, Settings

logger = logging.getLogger("vllm.peanut_serve")

_RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def register() -> None:
    """Entry point in `vllm.general_plugins`, which the server, the engine and every worker call, sometimes twice.

    Fixes two bugs of LoRA in vLLM: on the CPU, and when an adapter is replaced. If PEANUT_ADAPTERS is set, serves the
    adapters in it by name.
    """
    from peanut_serve.vllm_plugin.lora.identity import distinguish_versions

    distinguish_versions()
    _fix_cpu_lora()
    if os.environ.get(ADAPTERS) and multiprocessing.parent_process() is None:
        _serve_adapters()


def _fix_cpu_lora() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    name = "peanut_serve.vllm_plugin.lora.cpu_operators.GroupedPunicaWrapperCPU"
    setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: name))  # noqa: B010


def _serve_adapters() -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    if "peanut" in LoRAResolverRegistry.get_supported_resolvers():
        return
    from peanut_serve.vllm_plugin.lora.live_adapters import watch
    from peanut_serve.vllm_plugin.lora.resolver import PeanutResolver

    resolver = PeanutResolver(Settings.read())
    LoRAResolverRegistry.register_resolver("peanut", resolver)
    watch(resolver)
    if _RUNTIME_LORA not in os.environ:
        _resolve_without_routes()


def _resolve_without_routes() -> None:
    """Let vLLM call resolvers, without adding the routes that load any path that a client names."""
    from vllm.entrypoints.serve.lora import api_router

    os.environ[_RUNTIME_LORA] = "1"
    api_router.attach_router = lambda app: None
