"""What a name means inside vLLM: what the admitted request was admitted for, and nothing else.

vLLM asks `OpenAIServingModels` (`vllm/entrypoints/openai/models/serving.py`) about the `model` of a request. Its own
list of LoRA adapters and its resolvers are replaced: the catalogue of variants decides, in every mode.
"""

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest

from peanut_serve.lora.folders import LoraFolder
from peanut_serve.swapping.requests import Admitted
from peanut_serve.swapping.server import VariantServer
from peanut_serve.tenants.visits import may_use

# the request that is being handled; every request has its own context
admitted: ContextVar[Admitted | None] = ContextVar("admitted", default=None)


def lora_request(name: str, folder: LoraFolder) -> LoRARequest:
    """vLLM's request for a LoRA adapter. The path has the digest, so that the prefix cache separates versions."""
    return LoRARequest(name, folder.number, str(folder.path))


class AdmittedAdapter(dict[str, LoRARequest]):
    """Replaces `OpenAIServingModels.lora_requests`: the adapter of the request that is being handled.

    The dictionary itself stays empty.
    """

    def __contains__(self, name: object) -> bool:
        request = admitted.get()
        return request is not None and request.lora is not None and request.model == name

    def __getitem__(self, name: str) -> LoRARequest:
        request = admitted.get()
        if request is None or request.lora is None or request.model != name:
            raise KeyError(name)
        return lora_request(request.name, request.lora)

    def get(self, name: str, default: Any = None) -> Any:
        """See `dict.get`, which does not call `__getitem__`."""
        return self[name] if name in self else default  # noqa: SIM401 - that would be this method

    def __iter__(self) -> Iterator[str]:
        return iter(())


def serve_variants(models: OpenAIServingModels, server: VariantServer) -> None:
    """Let the catalogue decide about names in vLLM's requests, list its variants, and name them in responses."""
    base = models.base_model_paths[0]

    def is_base_model(name: str) -> bool:
        """Whether a request with this `model` uses the engine's weights without a LoRA adapter."""
        request = admitted.get()
        if request is None:
            # of a route that needs no weights: NAME@current is a name while a release is open
            return server.has(server.catalogue.answering(name, None))
        return request.model == name and request.lora is None

    def source_of(name: str) -> str:
        """The entry of a folder of variants, or the Hub id, that a name stands for; never a path."""
        record = server.catalogue.records.variants.get(name)
        return name if record is None else record.source

    async def show_available_models() -> ModelList:
        """The variants that this client may use. `root` is what a name stands for: an alias has another one."""
        length = models.model_config.max_model_len
        cards = [
            ModelCard(
                id=name,
                max_model_len=length,
                root=base.model_path if name in server.catalogue.bases else source_of(name),
                parent=None if name in server.catalogue.bases else base.name,
                permission=[ModelPermission()],
            )
            for name in await server.names()
            if may_use(name)
        ]
        return ModelList(data=cards)

    async def resolve_lora(name: str) -> LoRARequest | ErrorResponse:
        raise RuntimeError(f"{name} was not admitted")  # `AdmittedAdapter` has every adapter that may be used

    def model_name(lora: LoRARequest | None = None) -> str:
        request = admitted.get()
        return base.name if request is None else request.model

    models.lora_requests = AdmittedAdapter()
    own: dict[str, Callable[..., Any]] = {
        "is_base_model": is_base_model,
        "show_available_models": show_available_models,
        "resolve_lora": resolve_lora,
        "model_name": model_name,
    }
    for name, function in own.items():
        setattr(models, name, function)


def add_digest_to_fingerprints() -> None:
    """Add the digest of the variant to `system_fingerprint` in vLLM's responses."""

    def get_fingerprint(self: Any) -> str | None:
        own, request = self.__dict__.get("system_fingerprint"), admitted.get()
        if request is None:
            return str(own) if own is not None else None
        return "-".join(filter(None, [own, request.version.digest[:16]]))

    def set_fingerprint(self: Any, value: str | None) -> None:
        self.__dict__["system_fingerprint"] = value

    GenerateBaseServing.system_fingerprint = property(get_fingerprint, set_fingerprint)  # type: ignore[assignment]
