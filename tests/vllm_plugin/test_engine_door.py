"""The door to vLLM's engine, with a client that stands for the engine: who is let in, and until when."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from converters.errors import OptionError
from peanut_serve.errors import NotAdmittedError
from peanut_serve.lora.folders import LoraFolder
from peanut_serve.swapping.requests import Admitted
from peanut_serve.tenants.visits import Visit, current_visit
from peanut_serve.variants.version import VariantKind, Version

pytestmark = pytest.mark.slow  # vLLM is imported

FOLDER = LoraFolder(3, Path("/adapters/one"))


class Client:
    """Stands for `AsyncLLM`: every request has three outputs."""

    def __init__(self) -> None:
        self.closed = 0
        self.output_processor = SimpleNamespace(request_states={})
        self.calls: list[object] = []
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._pause)
        self.errored = False

    async def generate(self, prompt: str, params: object, request_id: str, *, lora_request: Any = None) -> Any:
        try:
            for number in range(3):
                yield number
        finally:
            self.closed += 1

    async def encode(self, prompt: str, params: object, request_id: str, lora_request: Any = None) -> Any:
        async for output in self.generate(prompt, params, request_id, lora_request=lora_request):
            yield output

    async def abort(self, requests: list[str], internal: bool) -> None:
        self.calls.append(("abort", *requests))

    async def _pause(self, mode: str, clear_cache: bool) -> None:
        self.calls.append(("pause", mode))


def admission(name: str, is_running: Callable[[], bool] = lambda: True, lora: LoraFolder | None = None) -> Admitted:
    return Admitted(name, Version("digest", VariantKind.BASE), is_running, lora)


@pytest.fixture(params=["generate", "encode"])
def ask(request: pytest.FixtureRequest) -> Callable[..., AsyncGenerator[int, None]]:
    from peanut_serve.vllm_plugin.swap.engine_door import guard

    client: Any = Client()
    guard(client)
    return lambda lora=None: getattr(client, request.param)("prompt", None, "id", lora_request=lora)


async def outputs(ask: Callable[..., Any], request: Admitted | None, lora: object = None) -> list[int]:
    from peanut_serve.vllm_plugin.swap.models import admitted

    admitted.set(request)
    return [output async for output in ask(lora)]


def test_who_is_let_in(ask: Callable[..., Any]) -> None:
    from peanut_serve.vllm_plugin.swap.models import lora_request

    own, other = lora_request("task", FOLDER), lora_request("task", LoraFolder(4, Path("/adapters/two")))
    assert asyncio.run(outputs(ask, admission("base"))) == [0, 1, 2]
    assert asyncio.run(outputs(ask, admission("task", lora=FOLDER), own)) == [0, 1, 2]
    for request, lora, reason in (
        (None, None, "was not admitted"),
        (admission("base"), own, "with another adapter"),
        (admission("task", lora=FOLDER), None, "with another adapter"),
        (admission("task", lora=FOLDER), other, "with another adapter"),
        (admission("base", lambda: False), None, "has ended"),
    ):
        with pytest.raises(NotAdmittedError, match=reason):
            asyncio.run(outputs(ask, request, lora))


def test_work_that_outlives_its_request_stops(ask: Callable[..., Any]) -> None:
    """A task that the request has started goes on after it: it gets no further output."""

    async def test() -> None:
        from peanut_serve.vllm_plugin.swap.models import admitted

        running = True
        admitted.set(admission("base", lambda: running))
        found: list[int] = []

        async def background() -> None:
            async for output in ask():
                found.append(output)
                await asyncio.sleep(0)

        task = asyncio.create_task(background())
        await asyncio.sleep(0)
        running = False
        with pytest.raises(NotAdmittedError, match="has ended"):
            await task
        assert found == [0]

    asyncio.run(test())


def test_this_package_itself_is_let_in(ask: Callable[..., Any]) -> None:
    async def test() -> list[int]:
        from peanut_serve.vllm_plugin.swap.engine_door import is_own_request

        is_own_request.set(True)
        return await outputs(ask, None)

    assert asyncio.run(test()) == [0, 1, 2]


def test_the_tokens_of_embeddings_are_counted() -> None:
    """Once, when the request has ended."""
    from vllm.outputs import PoolingRequestOutput

    from peanut_serve.vllm_plugin.swap.engine_door import guard

    class Embedding(Client):
        async def encode(self, prompt: str, params: object, request_id: str, lora_request: Any = None) -> Any:
            for finished in (False, True):
                yield PoolingRequestOutput(request_id, None, [1, 2, 3], 0, finished)

    def counted() -> float:
        return REGISTRY.get_sample_value("peanut_tokens_total", {"variant": "embedding", "kind": "prompt"}) or 0.0

    client: Any = Embedding()
    guard(client)
    before = counted()
    asyncio.run(outputs(lambda lora: client.encode("prompt", None, "id", lora_request=lora), admission("embedding")))
    assert counted() - before == 3


@pytest.mark.parametrize(("is_read", "generated"), [(True, 3), (False, 1)])
def test_the_tokens_of_a_tenant_are_counted_however_it_ends(is_read: bool, generated: int) -> None:
    """Of a stream whose client leaves, those that came before."""
    from vllm.outputs import CompletionOutput, RequestOutput

    from peanut_serve.vllm_plugin.swap.engine_door import guard
    from peanut_serve.vllm_plugin.swap.models import admitted

    class Streaming(Client):
        async def generate(self, prompt: str, params: object, request_id: str, *, lora_request: Any = None) -> Any:
            for number in range(3):
                one = CompletionOutput(0, "a", [number], None, None)
                yield RequestOutput(request_id, prompt, [1, 2, 3, 4], None, [one], finished=number == 2)

    def counted() -> list[float]:
        labels = {"variant": "streamed", "tenant": "team"}
        families = ("prompt_tokens", "generated_tokens")
        own = [REGISTRY.get_sample_value(f"peanut_usage_{family}_total", labels) or 0.0 for family in families]
        kinds = ({"variant": "streamed", "kind": kind} for kind in ("prompt", "generated"))
        return [*own, *(REGISTRY.get_sample_value("peanut_tokens_total", kind) or 0.0 for kind in kinds)]

    async def ask() -> None:
        admitted.set(admission("streamed"))
        current_visit.set(Visit(label="team"))
        outputs = client.generate("prompt", None, "id")
        async for _ in outputs:
            if not is_read:
                await outputs.aclose()
                break

    client: Any = Streaming()
    guard(client)
    before = counted()
    asyncio.run(ask())
    assert [after - was for after, was in zip(counted(), before, strict=True)] == [4, generated, 4, generated]


def test_a_pause_aborts_what_is_left_in_the_engine() -> None:
    from peanut_serve.vllm_plugin.swap.engine import SwapEngine

    client: Any = Client()
    engine = SwapEngine(client, keeps_prefixes=False)
    asyncio.run(engine.pause())
    client.output_processor.request_states = {"left": object()}
    asyncio.run(engine.pause())
    assert client.calls == [("pause", "wait"), ("abort", "left"), ("pause", "wait")]


def test_a_model_that_does_not_generate_is_refused() -> None:
    """There is no canary for it, so a swap could not be checked. (LoRA mode serves it: test_swap_modes.py.)"""
    from peanut_serve.vllm_plugin.swap.endpoints import _build

    async def tasks() -> tuple[str, ...]:
        return ("embed",)

    client: Any = SimpleNamespace(get_supported_tasks=tasks)
    settings: Any = SimpleNamespace(mode="merged")
    with pytest.raises(OptionError, match="--mode merged needs a model that generates text"):
        asyncio.run(_build(settings, client, Namespace()))
