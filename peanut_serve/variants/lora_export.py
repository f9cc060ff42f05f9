"""A version that is served as LoRA: how its factors are written, and what vLLM allows."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from converters import Adapter, Checkpoint, Plan, Weighted, __version__
from converters.errors import ConversionError
from converters.serving import LoraOptions, as_lora, plan_lora_adapter, plan_merge, write_lora_adapter

logger = logging.getLogger("vllm.peanut_serve")

# of what is written; in the keys of the cache, so that an entry of an older form is not served
_FORM = 2

# vLLM's packed modules, which --lora-target-modules may name instead of their parts
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def kind_of(module: str) -> str:
    """By which name vLLM's --lora-target-modules has a module: the last part, or `experts` for one of theirs.

    vLLM wraps all experts of a layer as one module of that name. If it is not among the targets, it silently leaves
    the update of the experts out.
    """
    return "experts" if ".experts." in f".{module}." else module.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class LoraLimits:
    """What vLLM was started with.

    Attributes:
        max_rank: largest rank.
        target_modules: last parts of the names of the modules that may be updated; None for any.
        dtype: of the factors: `fp32`, `bf16` or `fp16`.
    """

    max_rank: int
    target_modules: frozenset[str] | None = None
    dtype: str = "fp32"

    def refusal(self, r: int, kinds: frozenset[str]) -> str | None:
        """Why vLLM would refuse an adapter without an explanation to the client, or leave out a part of it.

        Args:
            r: its largest rank.
            kinds: last parts of the names of the modules it updates.
        """
        if r > self.max_rank:
            return f"its rank is {r}, but vLLM runs with --max-lora-rank {self.max_rank}"
        if self.target_modules is not None:
            allowed = {part for kind in self.target_modules for part in _PACKED.get(kind, (kind,))}
            if excluded := sorted(kinds - allowed):
                return f"it updates {excluded[0]}, which vLLM's --lora-target-modules does not include"
        return None


@dataclass(frozen=True, eq=False)
class LoraExport:
    """Writes an adapter as a LoRA adapter of a base.

    Attributes:
        key: identity of what is written: θ, W0, the dtype and this package's version.
        write: writes it to a folder. Raises `PeanutError` if it cannot be expressed as LoRA that
            vLLM loads.
    """

    key: str
    write: Callable[[Path], None]


def lora_refusal(plan: Plan, limits: LoraLimits) -> str | None:
    """Why vLLM cannot serve a planned merge as LoRA; None if it can."""
    try:
        converted = as_lora(plan, plan.base.folder, LoraOptions(runtime="vllm"))
    except ConversionError as error:
        return str(error)
    kinds = frozenset(map(kind_of, converted.modules))
    if converted.vllm_refuses:
        return converted.vllm_refuses[0]
    return limits.refusal(converted.r, kinds)


def lora_export(name: str, adapter: Adapter, base: Checkpoint, dtype: str, device: str) -> LoraExport:
    """How to write an adapter as LoRA.

    Args:
        name: of the variant, for logs.
        adapter: it was checked against the base.
        base: W0.
        dtype: of the factors: `fp32`, `bf16` or `fp16`.
        device: where f is evaluated.
    """

    def write(folder: Path) -> None:
        """Evaluate the factors, and compare a sample of them with the update."""
        start = time.perf_counter()
        base.check_unchanged()
        plan = plan_merge(base, [Weighted(adapter)], dtype=dtype)
        converted = plan_lora_adapter(plan, folder, options=LoraOptions(runtime="vllm"), otherwise="")
        check = write_lora_adapter(converted, device=device, companions=False)
        took = time.perf_counter() - start
        logger.info("evaluated %s in %.2f s, error %.1e", name, took, check.max_error)

    facts = [_FORM, __version__, adapter.digest, base.fingerprint, dtype]
    return LoraExport(hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40], write)
