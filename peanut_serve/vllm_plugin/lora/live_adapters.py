"""Makes `OpenAIServingModels` notice adapters that change while vLLM runs.

`vllm/entrypoints/openai/models/serving.py` keeps the LoRARequest of each name forever. Here the entry is removed as
soon as the adapter's files change, so that the next request resolves the name again: to another digest, another path
and another key of the prefix cache; or to an error.
"""

import functools
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from peanut_serve.vllm_plugin.lora.resolver import PeanutResolver, Served

# the adapter of the request that is being handled; every request has its own context
_resolved: ContextVar[LoRARequest | None] = ContextVar("resolved", default=None)

# a request that was given a LoRARequest reaches the engine much sooner than this
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class _Retired:
    request: LoRARequest
    served: Served
    since: float


class LiveAdapters(dict[str, LoRARequest]):
    """`OpenAIServingModels.lora_requests`, without the names of adapters that were changed or removed."""

    def __init__(self, resolver: PeanutResolver, engine: EngineClient) -> None:
        super().__init__()
        self._resolver, self._engine = resolver, engine
        self._retired: list[_Retired] = []

    def __contains__(self, name: object) -> bool:
        """Called by vLLM for every request, sometimes twice; the first call checks the adapter's files."""
        if _is_resolved(name):
            return True
        found = super().get(name) if isinstance(name, str) else None
        if found is None:
            return False
        served = self._resolver.served.get(found.lora_name)
        if served is not None and served.source.state() != served.exported.state:
            self._retire(found, served)
            return False
        _resolved.set(found)
        return True

    def __getitem__(self, name: str) -> LoRARequest:
        """The version that this request was given first, even if it has been replaced since."""
        resolved = _resolved.get()
        return resolved if resolved is not None and _is_resolved(name) else super().__getitem__(name)

    def drop_gone(self) -> None:
        """Remove every adapter that was changed or removed on disk."""
        for name in list(self):
            _ = name in self  # which removes it if needed

    async def free_retired(self) -> None:
        """Release old versions that no request in flight can need."""
        if not isinstance(self._engine, AsyncLLM):
            return  # such a client does not list its requests
        states = self._engine.output_processor.request_states.values()
        in_flight = {state.lora_request.lora_path for state in states if state.lora_request is not None}
        for retired in list(self._retired):
            is_old = time.monotonic() - retired.since > _GRACE_SECONDS
            if is_old and retired.request.lora_path not in in_flight:
                self._retired.remove(retired)
                await self._engine.remove_lora(retired.request.lora_int_id)
                retired.served.exported.lease.release()

    def _retire(self, request: LoRARequest, served: Served) -> None:
        del self._resolver.served[request.lora_name]
        del self[request.lora_name]
        self._retired.append(_Retired(request, served, time.monotonic()))


def _is_resolved(name: object) -> bool:
    resolved = _resolved.get()
    return resolved is not None and resolved.lora_name == name


def watch(resolver: PeanutResolver) -> None:
    """Patch `OpenAIServingModels`, so that new instances notice changes of the resolver's adapters."""
    models: Any = OpenAIServingModels
    models.__init__ = _attaching(models.__init__, resolver)
    models.resolve_lora = _freeing(models.resolve_lora)
    models.show_available_models = _listing(models.show_available_models, resolver)


def _attaching(build: Callable[..., None], resolver: PeanutResolver) -> Callable[..., None]:
    @functools.wraps(build)
    def init(self: OpenAIServingModels, engine_client: EngineClient, *args: Any, **kwargs: Any) -> None:
        build(self, engine_client, *args, **kwargs)
        resolver.attach(engine_client.vllm_config)
        self.lora_requests = LiveAdapters(resolver, engine_client)

    return init


def _freeing(resolve: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(resolve)
    async def resolve_lora(self: OpenAIServingModels, lora_name: str) -> LoRARequest | ErrorResponse:
        if isinstance(self.lora_requests, LiveAdapters):
            self.lora_requests.drop_gone()
            await self.lora_requests.free_retired()
        found: LoRARequest | ErrorResponse = await resolve(self, lora_name)
        if isinstance(found, LoRARequest):
            _resolved.set(found)
        return found

    return resolve_lora


def _listing(show: Callable[..., Any], resolver: PeanutResolver) -> Callable[..., Any]:
    @functools.wraps(show)
    async def show_available_models(self: OpenAIServingModels) -> Any:
        """Also list adapters that were not used yet, which vLLM would leave out."""
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        if isinstance(self.lora_requests, LiveAdapters):
            self.lora_requests.drop_gone()
        shown = await show(self)
        known = {card.id for card in shown.data}
        base = self.base_model_paths[0].name
        shown.data += [
            ModelCard(id=name, root=name, parent=base, permission=[ModelPermission()])
            for name in resolver.roots.names()
            if name not in known
        ]
        return shown

    return show_available_models
