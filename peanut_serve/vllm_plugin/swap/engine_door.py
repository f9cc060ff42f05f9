"""The one door to the engine: it lets in requests that were admitted and are still running, with their own adapter.

All of vLLM's handlers call `AsyncLLM.generate` or `AsyncLLM.encode`. Work that goes on after its request has ended,
or reaches the engine by a way that the middleware does not know, is refused here.
"""

import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM

from peanut_serve.errors import NotAdmittedError
from peanut_serve.swapping import metrics
from peanut_serve.swapping.requests import Admitted
from peanut_serve.tenants.usage import count_tokens
from peanut_serve.tenants.visits import current_tenant
from peanut_serve.vllm_plugin.swap.models import admitted

# set while this package itself uses the engine, for a canary
is_own_request: ContextVar[bool] = ContextVar("is_own_request", default=False)


def guard(client: AsyncLLM) -> None:
    """Check every request to the engine, and count its tokens by variant."""
    client.generate = _guarded(client.generate)  # type: ignore[method-assign]
    client.encode = _guarded(client.encode)  # type: ignore[method-assign]


def _guarded(run: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    signature = inspect.signature(run)

    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """Check before every output: a request may end before its work does."""
        if is_own_request.get():
            async with aclosing(run(*args, **kwargs)) as outputs:
                async for output in outputs:
                    yield output
            return
        request = _checked(signature.bind(*args, **kwargs).arguments.get("lora_request"))
        tokens = _Tokens(request)
        try:
            async with aclosing(run(*args, **kwargs)) as outputs:
                async for output in outputs:
                    _check_running(request)
                    tokens.see(output)
                    yield output
        finally:
            tokens.count()

    return guarded


def _checked(lora: LoRARequest | None) -> Admitted:
    """The admitted request, which must use this LoRA adapter. Raises `NotAdmittedError`."""
    request = admitted.get()
    if request is None:
        raise NotAdmittedError("a request reached the engine that was not admitted; please report how it was sent")
    _check_running(request)
    # not by `==`: vLLM's own compares only the names
    found = None if lora is None else (lora.lora_int_id, lora.lora_path)
    if found != (None if request.lora is None else (request.lora.number, str(request.lora.path))):
        raise NotAdmittedError(
            f"a request for {request.name} reached the engine with another adapter; please report how it was sent"
        )
    return request


def _check_running(request: Admitted) -> None:
    if not request.is_running():
        raise NotAdmittedError(f"the request for {request.name} has ended; the engine may have other weights now")


class _Tokens:
    """The tokens of one request to the engine, as far as it has told of them.

    They are counted when the request ends in any way. Of one whose client leaves, those are counted that came before;
    without `stream`, vLLM tells of none before the end.

    Args:
        request: the admitted request that they are part of.
    """

    def __init__(self, request: Admitted) -> None:
        self._variant, self._path = request.name, request.path
        self._prompt, self._generated = 0, 0

    def see(self, output: object) -> None:
        """Note an output. Those of generation have all tokens, or the latest, depending on the client's `stream`."""
        if isinstance(output, RequestOutput):
            self._prompt = len(output.prompt_token_ids or ())
            self._generated += sum(len(one.token_ids) for one in output.outputs)
        elif isinstance(output, PoolingRequestOutput) and output.finished:
            self._prompt = len(output.prompt_token_ids)

    def count(self) -> None:
        """Count them by variant, by tenant, and by how they were computed."""
        if self._prompt or self._generated:
            metrics.TOKENS.labels(self._variant, "prompt").inc(self._prompt)
            if self._generated:  # none where the model computes embeddings
                metrics.TOKENS.labels(self._variant, "generated").inc(self._generated)
                metrics.PATH_TOKENS.labels(self._path).inc(self._generated)
            count_tokens(self._variant, current_tenant(), self._prompt, self._generated)


class PrefixSalts:
    """Separates the prefixes of variants in vLLM's prefix cache by a salt."""

    def __init__(self, client: AsyncLLM) -> None:
        self._active = ""
        self._assign = client.input_processor.assign_request_id
        client.input_processor.assign_request_id = self._assign_salted  # type: ignore[method-assign]

    def activate(self, digest: str) -> None:
        """Use this digest as the salt: the engine now has these weights, and no request for others."""
        self._active = digest

    def _assign_salted(self, request: EngineCoreRequest) -> None:
        """Replaces `InputProcessor.assign_request_id`, which every request passes; keeps the client's own salt."""
        request.cache_salt = f"{self._active}:{request.cache_salt or ''}"
        self._assign(request)
