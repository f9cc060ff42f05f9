"""vLLM's LoRA resolver for trained adapters: a request names one in `model`, and θ is evaluated on first use.

vLLM calls a resolver once per name (`vllm/lora/resolver.py`), and keeps the result forever. `live_adapters.py`
handles adapters that are replaced or removed later.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

from vllm.config import LoRAConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from converters.errors import PeanutError
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.exporter import Exported, LoraExporter
from peanut_serve.settings.environment import Settings
from peanut_serve.variants.roots import AdapterRoots, VariantSource

logger = logging.getLogger("vllm.peanut_serve")

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# vLLM's packed modules, which --lora-target-modules may name instead of their parts
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Served:
    """An adapter that was passed to vLLM."""

    source: VariantSource
    exported: Exported


class PeanutResolver(LoRAResolver):
    """Finds adapters by name in the roots of the settings.

    Attributes:
        roots: folders and Hub ids of adapters.
        served: name -> the version that was last passed to vLLM.
    """

    def __init__(self, settings: Settings) -> None:
        self.roots = AdapterRoots(settings.roots)
        self.served: dict[str, Served] = {}
        self._settings = settings
        self._config: VllmConfig | None = None
        self._exporters: dict[str, LoraExporter] = {}

    def attach(self, config: VllmConfig) -> None:
        """Set vLLM's configuration: the revision of the base, the dtype and the limits on LoRA are read from it."""
        self._config = config

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """See `LoRAResolver`. Returns None if no adapter in the roots has this name.

        Raises `VLLMValidationError`, which vLLM answers with status 400, if the adapter cannot be served.
        """
        try:
            source = self.roots.find(lora_name)
            if source is None:
                return None
            start = time.perf_counter()
            exported = await _in_thread(self._exporter(base_model_name), source)
            self._check_limits(exported)
        except (PeanutError, OSError) as error:
            reason = " ".join(str(error).split())
            logger.warning("adapter %s cannot be served: %s", lora_name, reason)
            raise VLLMValidationError(f"the adapter {lora_name} cannot be served: {reason}") from None
        logger.info("adapter %s: %s in %.2f s", lora_name, exported.digest, time.perf_counter() - start)
        if (earlier := self.served.get(lora_name)) is not None:
            earlier.exported.lease.release()  # vLLM could not load that one
        self.served[lora_name] = Served(source, exported)
        # vLLM assigns its own id; the path, which contains the digest, is part of the keys of the prefix cache
        return LoRARequest(lora_name, 1, str(exported.lease.folder))

    def _exporter(self, base: str) -> LoraExporter:
        if base not in self._exporters:
            model = self._config.model_config if self._config else None
            dtype = str(model.dtype).removeprefix("torch.") if model else "float32"
            self._exporters[base] = LoraExporter(
                base,
                LoraCache(self._settings.cache, self._settings.cache_bytes),
                revision=model.revision if model else None,
                dtype=_DTYPES.get(dtype, "fp32"),
                device=self._settings.device,
            )
        return self._exporters[base]

    def fits(self, r: int, kinds: frozenset[str]) -> bool:
        """Whether vLLM's limits on LoRA allow such an adapter; false if it was started without LoRA."""
        limits = self._config.lora_config if self._config else None
        return limits is not None and _refusal(limits, r, kinds) is None

    def _check_limits(self, exported: Exported) -> None:
        """Refuse what vLLM would refuse without an explanation to the client, or would silently leave out."""
        limits = self._config.lora_config if self._config else None
        reason = _refusal(limits, exported.r, exported.kinds) if limits is not None else None
        if reason is not None:
            exported.lease.release()
            raise RefusedByLimitsError(reason)


def _refusal(limits: LoRAConfig, r: int, kinds: frozenset[str]) -> str | None:
    if r > limits.max_lora_rank:
        return f"its rank is {r}, but vLLM runs with --max-lora-rank {limits.max_lora_rank}"
    if limits.target_modules is not None:
        allowed = {part for kind in limits.target_modules for part in _PACKED.get(kind, (kind,))}
        if excluded := sorted(kinds - allowed):
            return f"it updates {excluded[0]}, which vLLM's --lora-target-modules does not include"
    return None


async def _in_thread(exporter: LoraExporter, source: VariantSource) -> Exported:
    """Export without blocking the event loop. If the request is cancelled meanwhile, the result is released."""
    exporting = asyncio.ensure_future(asyncio.to_thread(exporter.export, source))
    try:
        return await asyncio.shield(exporting)
    except asyncio.CancelledError:
        exporting.add_done_callback(_release)
        raise


def _release(exporting: "asyncio.Future[Exported]") -> None:
    if not exporting.cancelled() and exporting.exception() is None:
        exporting.result().lease.release()


class RefusedByLimitsError(PeanutError):
    """The adapter exceeds the limits on LoRA that vLLM was started with."""
