"""The endpoint plugin for vLLM (`vllm.endpoint_plugins`), which serves the variants of the catalogue in every mode.

vLLM loads it only if VLLM_PLUGINS names it; `peanut-serve` sets that.
"""

import asyncio
import logging
import os
from argparse import Namespace
from dataclasses import replace

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm import envs
from vllm.config import LoRAConfig, ModelConfig
from vllm.engine.protocol import EngineClient
from vllm.v1.engine.async_llm import AsyncLLM

from converters import open_checkpoint
from converters.errors import OptionError
from converters.serving import find_base
from peanut_serve.releases.control import AuditedReleases
from peanut_serve.releases.releasing import Releases
from peanut_serve.releases.routes import add_releases
from peanut_serve.settings.admin_key import KEY_VARIABLE
from peanut_serve.settings.server import ServerSettings
from peanut_serve.signals.redaction import hide_keys
from peanut_serve.signals.tracing import start_tracing
from peanut_serve.swapping.assembly import Host, assemble_server
from peanut_serve.swapping.requests import Admitted
from peanut_serve.swapping.server import VariantServer
from peanut_serve.tenants.keys import new_token
from peanut_serve.tenants.visits import FRONT, Tenants
from peanut_serve.tenants.watched import keys_of
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.release import Release
from peanut_serve.vllm_plugin.swap.engine import SwapEngine
from peanut_serve.vllm_plugin.swap.engine_door import PrefixSalts, guard
from peanut_serve.vllm_plugin.swap.lora_info import tell_residency
from peanut_serve.vllm_plugin.swap.models import add_digest_to_fingerprints, admitted, serve_variants
from peanut_serve.web.admin import admin_app
from peanut_serve.web.audit import AuditedControl, audit_log
from peanut_serve.web.connections import bind, bound_connections, serve_on
from peanut_serve.web.console.app import ConsoleHost, add_console
from peanut_serve.web.console.data_route import DataRoute
from peanut_serve.web.console.shell import console_link
from peanut_serve.web.middleware import VariantMiddleware
from peanut_serve.web.operator import VariantControl
from peanut_serve.web.operators import Operators
from peanut_serve.web.request_body import ClientLimits

logger = logging.getLogger("vllm.peanut_serve")

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LAST_WORDS = 5  # seconds that responses in progress get when the server stops and the engine is gone


class VariantEndpoints:
    """See `vllm/plugins/endpoint_plugins/interface.py`."""

    name = "peanut_serve_variants"
    required_tasks = None  # for any model: vLLM would serve one without the plugin, and so without its checks

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware between vLLM's routes and its check of API keys; replace /health and add /ready."""
        settings = ServerSettings.read()
        if settings is None:
            return

        hide_keys()

        def server() -> VariantServer:
            found: VariantServer = app.state.peanut_variants
            return found

        def admit(request: Admitted | None) -> None:
            admitted.set(request)

        args: Namespace = app.state.args
        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        tenants = None
        if (watched := keys_of(settings)) is not None:
            tenants = Tenants(watched, settings.max_queue)
            args.api_key = [
                ""
            ]  # vLLM would refuse the keys of the file; that means no check, whatever VLLM_API_KEY is
            keys.append(new_token())  # of the console
        app.state.peanut_route = DataRoute(app, keys[-1] if keys else None)
        limits = ClientLimits(body_bytes=settings.max_body, stall_seconds=settings.stall_timeout)
        app.add_middleware(
            VariantMiddleware,  # type: ignore[arg-type]
            find_server=server, admit=admit, keys=keys, limits=limits, tenants=tenants,
            is_behind_front=os.environ.get(FRONT) == "1",
        )  # fmt: skip

        @app.get("/health", summary="Check that the server works: it fails if a restart of the server is the cure")
        async def health() -> JSONResponse:
            """200 or 503, with the state of the engine, which the server itself restarts if it dies."""
            return _state(server(), server().is_alive)

        @app.get("/ready", summary="Check that requests can be answered, now or after a swap")
        async def ready() -> JSONResponse:
            """200 or 503, with the state of the engine."""
            return _state(server(), server().is_ready)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Test the engine and start serving. Raises `PeanutError` if that fails: the server then does not start."""
        settings = ServerSettings.read()
        if settings is None:
            return
        if not isinstance(engine_client, AsyncLLM):
            raise OptionError(f"serving variants needs an AsyncLLM of vLLM, but found {type(engine_client).__name__}")
        bound_connections()
        if await engine_client.is_tracing_enabled():
            start_tracing()
        server = await _build(settings, engine_client, args)
        state.peanut_variants = server
        _stop_with(server, engine_client, state)
        await server.start()
        tell_residency(engine_client)
        serve_variants(state.openai_serving_models, server)
        if settings.admin_port is not None:
            app = _admin(settings, settings.admin_port, server, state.peanut_route)
            listener = bind(settings.admin_host, settings.admin_port)
            state.peanut_admin = asyncio.create_task(serve_on(app, listener, settings.certificate))
        else:
            Releases(server, state.peanut_route, _ignore_end)
        if (name := server.last_activated) is not None:
            state.peanut_activating = asyncio.create_task(_activate_again(server, name))


def _admin(settings: ServerSettings, port: int, server: VariantServer, route: DataRoute) -> FastAPI:
    """The application of the admin port: the admin API, and the console unless it is off."""
    log, own = audit_log(settings), os.environ.get(KEY_VARIABLE)
    control = AuditedControl(VariantControl(server), log)
    operators = Operators([own] if own else [], keys_of(settings))
    app = admin_app(control, operators)
    add_releases(app, AuditedReleases(server, route, log))
    if settings.console:
        hosts = [settings.admin_host, *settings.console_host]
        add_console(app, ConsoleHost(control, operators, port, hosts, settings.drain_seconds, route))
        scheme = "https" if settings.certificate else "http"
        logger.info("the console is at %s", console_link(settings.admin_host, port, scheme))
    return app


def _ignore_end(name: str, release: Release, reason: str) -> None:
    """There is no audit log without the admin API; the server's log has it."""


def _state(server: VariantServer, is_well: bool) -> JSONResponse:
    engine = server.engine_facts()
    answer = {"state": engine.state, "detail": engine.detail}
    return JSONResponse(answer) if is_well else JSONResponse(answer, 503, headers={"Retry-After": "5"})


async def _build(settings: ServerSettings, client: AsyncLLM, args: Namespace) -> VariantServer:
    generates = "generate" in await client.get_supported_tasks()
    if settings.mode != "lora" and not generates:
        raise OptionError(
            f"--mode {settings.mode} needs a model that generates text, to check its weights after a swap; this one "
            "does not: use --mode lora, or serve each merged folder with a vLLM server of its own"
        )
    found = find_base(args.model, client.model_config.revision)
    base = open_checkpoint(found.folder, found.repo_id, found.revision)
    add_digest_to_fingerprints()
    guard(client)
    is_salted = settings.prefix_cache == "salted"
    keeps_base = settings.mode != "lora" and settings.base_copy == "device"
    engine = SwapEngine(client, keeps_prefixes=is_salted, generates=generates, keeps_base=keeps_base)
    config = None if settings.mode == "merged" else client.vllm_config.lora_config
    lora = None if settings.mode == "merged" else _limits(config, client.model_config)
    host = Host(base, args.served_model_name or [args.model], lora, lora_slots=config.max_loras if config else 0)
    if is_salted:
        host = replace(host, on_active=PrefixSalts(client).activate)
    return await assemble_server(settings, engine, host)


def _limits(lora: LoRAConfig | None, model: ModelConfig) -> LoraLimits:
    """vLLM's limits on LoRA. Raises `OptionError` if it was started without LoRA."""
    if lora is None:
        raise OptionError("vLLM runs without LoRA; start it with --enable-lora, or use --mode merged")
    targets = None if lora.target_modules is None else frozenset(lora.target_modules)
    dtype = _DTYPES.get(str(model.dtype).removeprefix("torch."), "fp32")
    return LoraLimits(lora.max_lora_rank, targets, dtype)


def _stop_with(server: VariantServer, client: AsyncLLM, state: State) -> None:
    """Stop admitting requests when vLLM stops, which calls `shutdown` of its client in a thread.

    vLLM then waits for running requests, as --shutdown-timeout says, and stops the engine. After that it would wait
    for every connection to be closed, however slowly its client reads: that gets a bound here.
    """
    shutdown, loop = client.shutdown, asyncio.get_running_loop()

    def stopping(timeout: float | None = None) -> None:
        """Replaces `AsyncLLM.shutdown`."""
        if (http := getattr(state, "server", None)) is not None:
            http.config.timeout_graceful_shutdown = _LAST_WORDS
        if not loop.is_closed():
            loop.call_soon_threadsafe(server.stop)
        shutdown(timeout=timeout)

    client.shutdown = stopping  # type: ignore[method-assign]


async def _activate_again(server: VariantServer, name: str) -> None:
    try:
        await server.activate(name)
    except Exception as error:
        logger.error("variant=%s was active before the restart and cannot be activated: %s", name, error)
