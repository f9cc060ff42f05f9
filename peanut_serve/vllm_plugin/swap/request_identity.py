"""Identifies the variant of a request in the response, the token metrics and the prefix cache."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM

from peanut_serve.swapping import metrics
from peanut_serve.swapping.server import Admitted

# the request that is being handled; every request has its own context
admitted: ContextVar[Admitted | None] = ContextVar("admitted", default=None)


def name_variants_in_responses() -> None:
    """Set `model` of vLLM's responses to the requested variant, and add its digest to `system_fingerprint`."""
    models: Any = OpenAIServingModels
    own_name = models.model_name

    def model_name(self: OpenAIServingModels, lora_request: LoRARequest | None = None) -> str:
        request = admitted.get()
        return str(own_name(self, lora_request)) if request is None else request.name

    def get_fingerprint(self: Any) -> str | None:
        own, request = self.__dict__.get("system_fingerprint"), admitted.get()
        if request is None:
            return str(own) if own is not None else None
        return "-".join(filter(None, [own, request.version.digest[:16]]))

    def set_fingerprint(self: Any, value: str | None) -> None:
        self.__dict__["system_fingerprint"] = value

    models.model_name = model_name
    GenerateBaseServing.system_fingerprint = property(get_fingerprint, set_fingerprint)  # type: ignore[assignment]


def count_tokens(client: AsyncLLM) -> None:
    """Count the tokens of every request by its variant."""
    generate = client.generate

    async def counting(*args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        request = admitted.get()
        total: dict[int, int] = {}
        async with aclosing(generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                for one in output.outputs:
                    # cumulative or not, depending on the client's `stream`; either way, the last one is counted once
                    total[one.index] = total.get(one.index, 0) + len(one.token_ids)
                if output.finished and request is not None:
                    _count(request.name, output, sum(total.values()))
                yield output

    client.generate = counting  # type: ignore[method-assign]


def _count(name: str, output: RequestOutput, generated: int) -> None:
    metrics.TOKENS.labels(name, "prompt").inc(len(output.prompt_token_ids or ()))
    metrics.TOKENS.labels(name, "generated").inc(generated)


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
