"""How much memory a server needs, from the headers of its files: nothing is loaded or evaluated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import Checkpoint, Plan, Weighted, load_adapter
from converters.errors import AdapterError, ConversionError, OptionError, PeanutError
from converters.serving import VLLM_RANKS, LoraOptions, as_lora, plan_merge
from peanut_serve.variants.host_weights import allocated, stored
from peanut_serve.variants.lora_export import LoraLimits, kind_of
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.roots import AdapterRoots, looks_merged
from peanut_serve.variants.version import LoadedModel, VariantKind

_FULL, _SLIDING = "full_attention", "sliding_attention"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class VariantSize:
    """What one variant needs.

    Attributes:
        name: in requests.
        kind: how it is served: as LoRA, or by merged weights of an adapter or a checkpoint.
        rank: its largest rank as LoRA; None if it is merged.
        factors: bytes of its LoRA factors, in the dtype of the engine.
        merged: bytes in the host cache; 0 if it is served as LoRA.
        kinds: last parts of the names of the modules that it updates as LoRA.
        changed: tensors that differ from the base's, if it is merged.
    """

    name: str
    kind: VariantKind
    rank: int | None = None
    factors: int = 0
    merged: int = 0
    kinds: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class KeyValueSize:
    """The KV cache of a model.

    Attributes:
        full: bytes of a token in all layers that attend to every token.
        sliding: bytes of a token in the layers that attend to a window.
        window: its length, in tokens.
    """

    full: int
    sliding: int = 0
    window: int = 0

    @property
    def token(self) -> int:
        """Bytes of one token."""
        return self.full + self.sliding

    def sequence(self, length: int) -> int:
        """Bytes of a sequence of `length` tokens."""
        return self.full * length + self.sliding * min(length, self.window)


def engine_bytes(base: Checkpoint, dtype: str) -> int:
    """Bytes of the weights of a base in the engine.

    Args:
        base: the checkpoint.
        dtype: of the engine, a key of `BYTES`.
    """
    return sum(
        math.prod(info.shape) * BYTES[dtype] if info.torch_dtype.is_floating_point else info.nbytes
        for info in base.tensors.values()
    )


def engine_dtype(base: Checkpoint, given: str) -> str:
    """The dtype that vLLM computes in: `auto` is that of the config, but never float32."""
    if given != "auto":
        return given
    config = text_config(base.config)
    named = str(config.get("dtype") or config.get("torch_dtype") or base.config.get("dtype") or "bfloat16")
    return "float16" if named == "float16" else "bfloat16"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def key_value_size(config: Mapping[str, Any], nbytes: int) -> KeyValueSize | None:
    """The KV cache of a model, from its config; None if its layers are of kinds that are not known here.

    Args:
        config: of the model.
        nbytes: of one number in the cache.
    """
    config = text_config(config)
    try:
        layers = int(config.get("num_hidden_layers") or config["n_layer"])
        if config.get("kv_lora_rank"):  # latent attention: one vector for all heads
            return KeyValueSize(layers * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])) * nbytes)
        heads = int(config.get("num_attention_heads") or config["n_head"])
        width = int(config.get("head_dim") or int(config.get("hidden_size") or config["n_embd"]) // heads)
        per_layer = 2 * int(config.get("num_key_value_heads") or heads) * width * nbytes
    except (KeyError, TypeError, ValueError):
        return None
    kinds = config.get("layer_types") or [_FULL] * layers
    if not set(kinds) <= {_FULL, _SLIDING} or len(kinds) != layers:
        return None
    sliding, window = list(kinds).count(_SLIDING), int(config.get("sliding_window") or 0)
    if not window:
        sliding = 0
    return KeyValueSize((layers - sliding) * per_layer, sliding * per_layer, window)


def variant_sizes(
    base: Checkpoint, roots: Sequence[str], mode: str, dtype: str, keeps_base: bool = False
) -> tuple[list[VariantSize], dict[str, str]]:
    """The size of each variant in the folders, and why others cannot be served.

    Args:
        base: the checkpoint.
        roots: folders of variants, and Hub ids.
        mode: of the server.
        dtype: of the engine, a key of `BYTES`.
        keeps_base: whether the workers keep W0, so that exact factors suffice.
    """
    found, refused = [], {}
    model = LoadedModel(base, [[name] for name in base.tensors])
    limits = None if mode == "merged" else LoraLimits(VLLM_RANKS[-1])
    opener = VersionOpener(model, "cpu", limits, mode != "lora", keeps_base and mode != "lora")
    searched = AdapterRoots(roots)
    for name in searched.names():
        try:
            source = searched.find(name)
            if source is not None:
                found.append(_size(name, source.spec, opener, BYTES[dtype]))
        except (PeanutError, OSError) as error:
            refused[name] = " ".join(str(error).split())
    return found, refused


def _size(name: str, spec: Path | str, opener: VersionOpener, nbytes: int) -> VariantSize:
    if isinstance(spec, Path) and looks_merged(spec):
        version = opener.checkpoint(name, spec)
    else:
        version = opener.adapter(name, spec)
    if version.kind is not VariantKind.LORA:
        merged = allocated(stored(version.specs, version.factored))
        changed = frozenset(spec.name for spec in version.specs)
        return VariantSize(name, version.kind, merged=merged, changed=changed)
    plan: Plan = plan_merge(opener.model.base, [Weighted(load_adapter(spec))])
    try:
        lora = as_lora(plan, plan.base.folder, LoraOptions(runtime="vllm"))
    except ConversionError as error:
        raise AdapterError(str(error)) from error
    numbers = sum(lora.ranks[module] * sum(tensor.matrix_shape) for module, tensor in lora.modules.items())
    return VariantSize(name, version.kind, lora.r, numbers * nbytes, kinds=frozenset(map(kind_of, lora.modules)))


def device_copy_bytes(base: Checkpoint, variants: Sequence[VariantSize]) -> int:
    """Bytes of W0 that all workers together keep with --base-copy device, at most.

    vLLM loads some tensors together, such as q, k and v; that depends on its model. So all tensors of the parts that
    have a changed module are counted, such as those of an attention.
    """
    parts = {_part_of(name) for variant in variants for name in variant.changed}
    return sum(info.nbytes for info in base.tensors.values() if _part_of(info.name) in parts)


def _part_of(tensor: str) -> str:
    return tensor.rpartition(".")[0].rpartition(".")[0]


def slot_bytes(base: Checkpoint, variants: Sequence[VariantSize], dtype: str) -> tuple[int, int]:
    """What vLLM reserves for each adapter of a batch: its rank, and bytes in all modules that any adapter updates."""
    ranks = [variant.rank for variant in variants if variant.rank is not None]
    if not ranks:
        return 0, 0
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= max(16, *ranks)), VLLM_RANKS[-1])
    kinds = frozenset[str]().union(*(variant.kinds for variant in variants))
    matrices = [info for info in base.tensors.values() if info.name.endswith(".weight") and len(info.shape) == 2]
    numbers = sum(sum(info.shape) for info in matrices if kind_of(info.name.removesuffix(".weight")) in kinds)
    return rank, numbers * rank * BYTES[dtype]


def sequences_that_fit(free: int, cache: KeyValueSize, length: int) -> int:
    """How many sequences of a length fit in that many bytes. Raises `OptionError` if the length is not positive."""
    if length <= 0:
        raise OptionError(f"--max-model-len is {length}; expected a positive number")
    return max(free, 0) // cache.sequence(length)
