"""Adapters change while vLLM runs: what `OpenAIServingModels` needs to notice.

`vllm/entrypoints/openai/models/serving.py` keeps a LoRARequest under each name for ever. Here the entry goes as soon
as the adapter's files are others, so that the next request resolves the name anew: to another digest, another path,
another key of the prefix cache; or to an error.
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

# what the request that is being handled was told; every request has a context of its own
_answering: ContextVar[LoRARequest | None] = ContextVar("answering", default=None)

# a request that was handed a LoRARequest is in the engine long before
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class _Retired:
    request: LoRARequest
    served: Served
    since: float


class LiveAdapters(dict[str, LoRARequest]):
    """`OpenAIServingModels.lora_requests`: a name whose adapter has changed or gone is not in it any more."""

    def __init__(self, resolver: PeanutResolver, engine: EngineClient) -> None:
        super().__init__()
        self._resolver, self._engine = resolver, engine
        self._retired: list[_Retired] = []

    def __contains__(self, name: object) -> bool:
        """Asked by vLLM for every request, sometimes twice; the first time looks at the adapter's files."""
        if _is_answering(name):
            return True
        found = super().get(name) if isinstance(name, str) else None
        if found is None:
            return False
        served = self._resolver.served.get(found.lora_name)
        if served is not None and served.source.state() != served.exported.state:
            self._retire(found, served)
            return False
        _answering.set(found)
        return True

    def __getitem__(self, name: str) -> LoRARequest:
        """The version this request was told of, though it may have been replaced since."""
        answering = _answering.get()
        return answering if answering is not None and _is_answering(name) else super().__getitem__(name)

    def drop_gone(self) -> None:
        """Look at every adapter."""
        for name in list(self):
            _ = name in self

    async def free_retired(self) -> None:
        """Let go of versions that no request in flight can need."""
        if not isinstance(self._engine, AsyncLLM):
            return  # it does not tell which those are
        states = self._engine.output_processor.request_states.values()
        flying = {state.lora_request.lora_path for state in states if state.lora_request is not None}
        for retired in list(self._retired):
            old = time.monotonic() - retired.since > _GRACE_SECONDS
            if old and retired.request.lora_path not in flying:
                self._retired.remove(retired)
                await self._engine.remove_lora(retired.request.lora_int_id)
                retired.served.exported.lease.release()

    def _retire(self, request: LoRARequest, served: Served) -> None:
        del self._resolver.served[request.lora_name]
        del self[request.lora_name]
        self._retired.append(_Retired(request, served, time.monotonic()))


def _is_answering(name: object) -> bool:
    answering = _answering.get()
    return answering is not None and answering.lora_name == name


def watch(resolver: PeanutResolver) -> None:
    """Make every `OpenAIServingModels` that is built from now on notice what happens to the resolver's adapters."""
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
            _answering.set(found)
        return found

    return resolve_lora


def _listing(show: Callable[..., Any], resolver: PeanutResolver) -> Callable[..., Any]:
    @functools.wraps(show)
    async def show_available_models(self: OpenAIServingModels) -> Any:
        """vLLM lists adapters that were used; others can be asked for as well."""
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
