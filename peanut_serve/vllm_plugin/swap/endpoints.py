"""The endpoint plugin for vLLM (`vllm.endpoint_plugins`), which serves many variants with one engine by swapping.

vLLM loads it only if VLLM_PLUGINS names it; `peanut-serve --mode merged` sets that.
"""

import asyncio
import logging
import os
from argparse import Namespace
from dataclasses import replace

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.v1.engine.async_llm import AsyncLLM

from converters import open_checkpoint
from converters.errors import OptionError
from converters.serving import find_base
from peanut_serve.settings.admin_key import KEY_VARIABLE
from peanut_serve.settings.swapping import SwapSettings
from peanut_serve.swapping.assembly import Host, assemble_server
from peanut_serve.swapping.server import Admitted, VariantServer
from peanut_serve.variants.opening import FitsLora
from peanut_serve.variants.version import VariantKind
from peanut_serve.vllm_plugin.swap.engine import SwapEngine
from peanut_serve.vllm_plugin.swap.request_identity import (
    PrefixSalts,
    admitted,
    count_tokens,
    name_variants_in_responses,
)
from peanut_serve.web.admin import admin_app, bind, serve_on
from peanut_serve.web.middleware import VariantMiddleware
from peanut_serve.web.operator import VariantControl

logger = logging.getLogger("vllm.peanut_serve")


class VariantEndpoints:
    """See `vllm/plugins/endpoint_plugins/interface.py`."""

    name = "peanut_serve_variants"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware between vLLM's routes and its check of API keys; replace /health and add /ready."""
        if SwapSettings.read() is None:
            return

        def server() -> VariantServer:
            found: VariantServer = app.state.peanut_variants
            return found

        def admit(request: Admitted | None) -> None:
            admitted.set(request)
            _list_variants(server(), app.state.openai_serving_models, request)

        app.add_middleware(VariantMiddleware, find_server=server, admit=admit)  # type: ignore[arg-type]

        @app.get("/health", summary="Check that the engine is alive and has complete weights")
        @app.get("/ready", summary="Check that requests can be answered, now or after a swap")
        async def ready() -> JSONResponse:
            one = server()
            engine = one.engine_facts()
            answer = {"state": engine.state, "detail": engine.detail}
            if one.is_ready:
                return JSONResponse(answer)
            return JSONResponse(answer, 503, headers={"Retry-After": "5"})

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Test the engine and start swapping. Raises `PeanutError` if that fails: the server then does not start."""
        settings = SwapSettings.read()
        if settings is None:
            return
        if not isinstance(engine_client, AsyncLLM):
            raise OptionError(f"swapping needs an AsyncLLM of vLLM, but found {type(engine_client).__name__}")
        server = await _build(settings, engine_client, args)
        state.peanut_variants = server
        _stop_with(server, engine_client)
        await server.start()
        _list_variants(server, state.openai_serving_models, None)
        if settings.admin_port is not None:
            app = admin_app(VariantControl(server), os.environ[KEY_VARIABLE])
            listener = bind(settings.admin_host, settings.admin_port)
            state.peanut_admin = asyncio.create_task(serve_on(app, listener))
        if (name := server.last_activated) is not None:
            state.peanut_activating = asyncio.create_task(_activate_again(server, name))


async def _build(settings: SwapSettings, client: AsyncLLM, args: Namespace) -> VariantServer:
    found = find_base(args.model, client.model_config.revision)
    base = open_checkpoint(found.folder, found.repo_id, found.revision)
    name_variants_in_responses()
    count_tokens(client)
    is_salted = settings.prefix_cache == "salted"
    host = Host(base, args.served_model_name or [args.model], _fits_lora(settings))
    if is_salted:
        host = replace(host, on_active=PrefixSalts(client).activate)
    return await assemble_server(settings, SwapEngine(client, keeps_prefixes=is_salted), host)


def _fits_lora(settings: SwapSettings) -> FitsLora | None:
    if settings.mode != "auto":
        return None
    fits: FitsLora = LoRAResolverRegistry.get_resolver("peanut").fits  # type: ignore[attr-defined]
    return fits


def _list_variants(server: VariantServer, models: OpenAIServingModels, request: Admitted | None) -> None:
    """Add the names of variants to vLLM's list of models, without those that vLLM itself serves as LoRA."""
    path = models.base_model_paths[0].model_path
    known = {base.name for base in models.base_model_paths}
    if request is not None and (request.name in known) != (request.version.kind is VariantKind.LORA):
        return
    names = [name for name in server.names() if not server.is_lora(name)]
    models.base_model_paths[:] = [BaseModelPath(name=name, model_path=path) for name in names]


def _stop_with(server: VariantServer, client: AsyncLLM) -> None:
    """Stop admitting requests when vLLM stops, which calls `shutdown` of its client in a thread."""
    shutdown, loop = client.shutdown, asyncio.get_running_loop()

    def stopping(timeout: float | None = None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(server.stop)
        shutdown(timeout=timeout)

    client.shutdown = stopping  # type: ignore[method-assign]


async def _activate_again(server: VariantServer, name: str) -> None:
    try:
        await server.activate(name)
    except Exception as error:
        logger.error("variant=%s was active before the restart and cannot be activated: %s", name, error)
