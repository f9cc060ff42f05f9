"""vLLM's engine behind the interface of a swap, and its restart in a running server."""

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from vllm import SamplingParams
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor

from converters.serving import TensorInfo
from peanut_serve.errors import EngineDownError
from peanut_serve.lora.folders import LoraFolder
from peanut_serve.swapping.checks.canary import Canary
from peanut_serve.variants.on_device.copies import Room
from peanut_serve.variants.on_device.places import Place, encode_places
from peanut_serve.vllm_plugin.swap.engine_door import is_own_request
from peanut_serve.vllm_plugin.swap.models import lora_request

logger = logging.getLogger("vllm.peanut_serve")

T = TypeVar("T")

# an engine that does not answer for this long hangs; loading a large model from a slow disk takes minutes
_TIMEOUT_SECONDS = 600.0
_POLL_SECONDS = 0.2
_CANARY_TOKENS, _CANARY_PROMPT = 1, 24
_MAX_LOGPROBS = 20


class SwapEngine:
    """Implements `peanut_serve.swapping.transaction.Engine`.

    Args:
        client: vLLM's engine client.
        keeps_prefixes: salts separate variants in the prefix cache, so that it needs no reset.
        generates: whether the model generates text; if not, there is no canary.
        keeps_base: whether the workers have to be able to keep W0.
    """

    def __init__(
        self, client: AsyncLLM, keeps_prefixes: bool, generates: bool = True, keeps_base: bool = False
    ) -> None:
        self._client, self._keeps_prefixes, self._generates = client, keeps_prefixes, generates
        self._keeps_base = keeps_base
        self._learned: Sequence[TensorInfo] = ()  # what new workers have to learn
        self._kept: dict[str, TensorInfo] = {}  # and to keep

    @property
    def is_dead(self) -> bool:
        """Whether vLLM reports that the engine has died."""
        return bool(self._client.errored)

    async def pause(self) -> None:
        """Stop scheduling. The caches are kept; see `invalidate`.

        Every request has ended by now. What is left of one in the engine all the same is aborted.
        """
        if left := list(self._client.output_processor.request_states):
            logger.warning("aborting %d requests that have outlived their clients", len(left))
            await self._within(self._client.abort(left, internal=True))
        # not pause_generation, which sleeps for 20 ms so that clients get their last outputs before it returns
        await self._within(self._client.engine_core.pause_scheduler_async(mode="wait", clear_cache=False))

    async def resume(self) -> None:
        """Resume scheduling."""
        await self._within(self._client.resume_generation())

    async def apply(self, places: Sequence[Place], afresh: bool = False) -> None:
        """See `VariantWorker.peanut_apply`."""
        await self._call("peanut_apply", encode_places(places), afresh)

    async def learn(self, places: Sequence[TensorInfo]) -> list[list[str]]:
        """See `VariantWorker.peanut_learn`; collected from all workers, which may each have some of the layers."""
        found = await self._call("peanut_learn", encode_places(places), self._keeps_base)
        self._learned = places
        return [group for groups in found for group in groups]

    async def room(self, places: Sequence[TensorInfo]) -> list[Room]:
        """See `VariantWorker.peanut_room`."""
        return [Room(*found) for found in await self._call("peanut_room", encode_places(places))]

    async def keep(self, places: Sequence[TensorInfo]) -> int:
        """See `VariantWorker.peanut_keep`; the size is that of all workers' copies."""
        sizes = await self._call("peanut_keep", encode_places(places))
        self._kept |= {place.name: place for place in places}
        return sum(sizes)

    async def stage(self, places: Sequence[Place]) -> None:
        """See `VariantWorker.peanut_stage`."""
        await self._call("peanut_stage", encode_places(places))

    async def _call(self, method: str, *args: object) -> Any:
        """Call a method of every worker; returns their answers."""
        return await self._within(self._client.collective_rpc(method, args=args))

    async def invalidate(self) -> None:
        """Reset the prefix cache, unless salts separate variants in it, and the caches of encoders."""
        if not self._keeps_prefixes and not await self._within(self._client.reset_prefix_cache(reset_connector=True)):
            raise EngineDownError("vLLM did not reset its prefix cache, because requests are still running")
        await self._within(self._client.reset_mm_cache())
        await self._within(self._client.reset_encoder_cache())

    async def load_lora(self, name: str, folder: LoraFolder) -> None:
        """Load a LoRA adapter. Raises vLLM's error if it cannot."""
        try:
            await self._within(self._client.add_lora(lora_request(name, folder)))
        except Exception as error:
            if self.is_dead:
                raise EngineDownError(f"the engine died when it loaded {name}: {error}") from error
            raise

    async def ask_canary(self) -> Canary:
        """Generate greedy tokens with the highest logprobs, for a prompt that is not in a cache."""
        if not self._generates:
            return Canary((), ({0: 0.0},))
        size = self._client.model_config.get_vocab_size()
        prompt = tokens_input(
            [(7919 * i + 104729) % size for i in range(_CANARY_PROMPT)], cache_salt=f"canary-{uuid4()}"
        )
        params = SamplingParams(
            temperature=0.0,
            max_tokens=_CANARY_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=min(_MAX_LOGPROBS, max(1, self._client.model_config.max_logprobs)),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return await self._within(self._canary(prompt, params))

    async def _canary(self, prompt: TokensInput, params: SamplingParams) -> Canary:
        is_own_request.set(True)  # `_within` runs this in a context of its own
        async with aclosing(self._client.generate(prompt, params, f"canary-{uuid4()}")) as outputs:
            answer = [output async for output in outputs][-1].outputs[0]
        logprobs = tuple({token: entry.logprob for token, entry in known.items()} for known in answer.logprobs or ())
        return Canary(tuple(answer.token_ids), logprobs)

    async def restart(self) -> None:
        """Start new engine processes with the same options, for the existing client, which the server refers to.

        If this is cancelled, because the server stops, they end at once.
        """
        client, old = self._client, self._client.engine_core
        logger.warning("restarting the engine")
        await asyncio.to_thread(old.shutdown)
        if client.output_handler is not None:
            client.output_handler.cancel()
            await asyncio.wait([client.output_handler])
        client.output_processor.abort_requests(list(client.output_processor.request_states), internal=True)
        make = partial(
            EngineCoreClient.make_async_mp_client,
            vllm_config=client.vllm_config,
            executor_class=Executor.get_class(client.vllm_config),
            log_stats=client.log_stats,
            renderer=client.renderer,
        )
        client.engine_core = await _started(make)
        client.output_handler = None
        client._run_output_handler()  # type: ignore[no-untyped-call]
        if self._keeps_base and self._learned:  # by workers that are gone
            await self.pause()
            await self.learn(self._learned)
            await self.keep([*self._kept.values()])
            await self.resume()

    async def _within(self, call: Awaitable[T]) -> T:
        """Await a call, with a timeout: in vLLM a call never returns if the engine dies during it."""
        task, deadline = asyncio.ensure_future(call), time.monotonic() + _TIMEOUT_SECONDS
        try:
            while not (await asyncio.wait([task], timeout=_POLL_SECONDS))[0]:
                if self.is_dead:
                    raise EngineDownError("the engine has died")
                if time.monotonic() > deadline:
                    await asyncio.to_thread(self._client.engine_core.shutdown)
                    raise EngineDownError(f"the engine did not answer for {_TIMEOUT_SECONDS:.0f} s")
            return task.result()
        finally:
            task.cancel()


async def _started(make: Callable[[], EngineCoreClient]) -> EngineCoreClient:
    """What `make` starts, in a thread; if this is cancelled, the processes that it has started are killed.

    vLLM waits for an engine until it runs or has ended, which keeps a server that stops from ending.
    """
    starting = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        while not starting.done():
            for process in multiprocessing.active_children():
                process.kill()
            await asyncio.wait([starting], timeout=_POLL_SECONDS)
        starting.exception()  # what the killed processes led to
        raise
