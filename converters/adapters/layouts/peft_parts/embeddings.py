"""LoRA and DoRA on embeddings: `lora_embedding_A` (r, vocabulary), `lora_embedding_B` (in, r), as PEFT saves them."""

from collections.abc import Callable, Mapping

import torch

from converters.adapters.adapter import ModuleTheta
from converters.adapters.source import AdapterSource
from converters.errors import ThetaError
from converters.methods.lora.other_lora import EmbeddingLora
from converters.methods.multiplicative.embedding_dora import EmbeddingDora

EMBEDDING_PARAMETERS = {"lora_embedding_A": "embedding_A", "lora_embedding_B": "embedding_B"}
_PARTS = frozenset(EMBEDDING_PARAMETERS.values())
_MAGNITUDE = "magnitude_vector"


def is_embedding(parts: Mapping[str, str]) -> bool:
    """Whether a module has LoRA of an embedding."""
    return not _PARTS.isdisjoint(parts)


def find_tied_heads(source: AdapterSource, parts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Head -> the embedding whose LoRA it shares, by `ensure_weight_tying` and the same factors, transposed.

    Under DoRA it has a magnitude of its own, so that the two are not one delta.
    `parts` are those of all modules: part of θ -> key.
    """
    if not (source.config or {}).get("ensure_weight_tying"):
        return {}
    embeddings = {module: keys for module, keys in parts.items() if set(keys) >= _PARTS}
    heads = {module: keys for module, keys in parts.items() if set(keys) >= {"A", "B"}}
    tensor = source.store.tensor
    return {
        head: embedding
        for head, its in heads.items()
        for embedding, keys in embeddings.items()
        if torch.equal(tensor(its["A"]), tensor(keys["embedding_B"]).T)
        and torch.equal(tensor(its["B"]), tensor(keys["embedding_A"]).T)
    }


def read_embedding(
    source: AdapterSource,
    module: str,
    parts: Mapping[str, str],
    scaling_of: Callable[[str, int], float],
    keeps_ties: bool,
) -> ModuleTheta:
    """θ of one embedding.

    Args:
        source: the adapter.
        module: its name.
        parts: part of θ -> key.
        scaling_of: the module and its r -> s.
        keeps_ties: what is tied to it has the same LoRA.

    Raises `ThetaError` when a factor is missing, or there is more than LoRA or DoRA.
    """
    if missing := sorted(_PARTS - set(parts)):
        raise ThetaError(f"{module}: lora_{missing[0]} is missing; the adapter is incomplete")
    if extra := sorted(set(parts) - _PARTS - {_MAGNITUDE}):
        raise ThetaError(
            f"{module}: LoRA on an embedding, with {extra[0]} beside it, is not read here; merge it with PEFT's "
            "merge_and_unload"
        )
    keys = {part.removeprefix("embedding_"): key for part, key in sorted(parts.items())}
    shape = source.store.shapes[keys["A"]]
    scaling = scaling_of(module, shape[0] if shape else 0)
    if _MAGNITUDE in keys:
        return ModuleTheta(EmbeddingDora, keys, {"scaling": scaling})
    return ModuleTheta(EmbeddingLora, keys, {"scaling": scaling, **({"keeps_ties": True} if keeps_ties else {})})
