"""Plain decoders: language models whose tensors and ties follow from a few fields of their config.

transformers knows the same, and importing it takes longer than to merge a small model. So the decoders that most
adapters are trained on stand here, in a table. It counts only for a base that has exactly the tensors that it says;
everything else, and every name that it has no answer to, is decided by transformers' own class (`architecture.py`).
A test compares both, for every row.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from converters.models import config as model_config
from converters.models.architecture import Architecture, build_architecture
from converters.models.checkpoint import Checkpoint

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# a buffer that older versions of transformers stored with the weights
_STORED_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# linear layers of a block -> (out, in); h: hidden_size, i: intermediate_size, q: all heads, kv: all heads of keys
_QKV = {"self_attn.q_proj": ("q", "h"), "self_attn.k_proj": ("kv", "h"), "self_attn.v_proj": ("kv", "h")}
_ATTENTION = {**_QKV, "self_attn.o_proj": ("h", "q")}
_MLP = {"mlp.gate_proj": ("i", "h"), "mlp.up_proj": ("i", "h"), "mlp.down_proj": ("h", "i")}
_FUSED = {
    "self_attn.qkv_proj": ("qkv", "h"),
    "self_attn.o_proj": ("h", "q"),
    "mlp.gate_up_proj": ("2i", "h"),
    "mlp.down_proj": ("h", "i"),
}
_AFTER = {"post_attention_layernorm": "h", "post_feedforward_layernorm": "h"}
_BEFORE_AND_AFTER = {"input_layernorm": "h", "post_attention_layernorm": "h"}
_FOUR_NORMS = {**_BEFORE_AND_AFTER, "pre_feedforward_layernorm": "h", "post_feedforward_layernorm": "h"}
_NORMS_OF_HEADS = {"self_attn.q_norm": "d", "self_attn.k_norm": "d"}  # d: head_dim

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class _Decoder:
    """What a model type has.

    Attributes:
        name: its class with an output head.
        linear: linear layers of a block -> (out, in).
        norms: norms of a block -> their size.
        biased: linear layers of a block that always have a bias.
        biased_by: field of the config -> linear layers that have a bias if it is true. It is false by default.
        is_tied: what `tie_word_embeddings` is by default.
        head_dim_follows: head_dim is hidden_size / num_attention_heads by default; else the config has to state it.
    """

    name: str
    linear: Mapping[str, tuple[str, str]] = field(default_factory=lambda: {**_ATTENTION, **_MLP})
    norms: Mapping[str, str] = field(default_factory=lambda: _BEFORE_AND_AFTER)
    biased: frozenset[str] = frozenset()
    biased_by: Mapping[str, frozenset[str]] = field(default_factory=dict)
    is_tied: bool = False
    head_dim_follows: bool = True


_BY_ATTENTION = {"attention_bias": frozenset(_ATTENTION)}
_BY_BOTH = {**_BY_ATTENTION, "mlp_bias": frozenset(_MLP)}
_OLMO_NORMS = {**_AFTER, "self_attn.q_norm": "q", "self_attn.k_norm": "kv"}

# model type -> what it has (transformers' `models/<type>/modeling_<type>.py`)
DECODERS: Mapping[str, _Decoder] = {
    "llama": _Decoder("LlamaForCausalLM", biased_by=_BY_BOTH),
    "mistral": _Decoder("MistralForCausalLM"),
    "qwen2": _Decoder("Qwen2ForCausalLM", biased=frozenset(_QKV)),
    "qwen3": _Decoder(
        "Qwen3ForCausalLM",
        norms={**_BEFORE_AND_AFTER, **_NORMS_OF_HEADS},
        biased_by=_BY_ATTENTION,
        head_dim_follows=False,
    ),
    "gemma": _Decoder("GemmaForCausalLM", biased_by=_BY_ATTENTION, is_tied=True, head_dim_follows=False),
    "gemma2": _Decoder(
        "Gemma2ForCausalLM", norms=_FOUR_NORMS, biased_by=_BY_ATTENTION, is_tied=True, head_dim_follows=False
    ),
    "gemma3_text": _Decoder(
        "Gemma3ForCausalLM",
        norms={**_FOUR_NORMS, **_NORMS_OF_HEADS},
        biased_by=_BY_ATTENTION,
        is_tied=True,
        head_dim_follows=False,
    ),
    "phi3": _Decoder("Phi3ForCausalLM", linear=_FUSED),
    "smollm3": _Decoder("SmolLM3ForCausalLM", biased_by=_BY_BOTH, is_tied=True),
    "granite": _Decoder("GraniteForCausalLM", biased_by=_BY_BOTH),
    "olmo2": _Decoder("Olmo2ForCausalLM", norms=_OLMO_NORMS, biased_by=_BY_ATTENTION),
    "olmo3": _Decoder("Olmo3ForCausalLM", norms=_OLMO_NORMS, biased_by=_BY_ATTENTION),
}


def class_for(base: Checkpoint, class_name: str | None, task_type: str | None = None) -> Architecture:
    """`class_name`, or the class that loads `task_type`, on the config of `base`: without model code, if that can be.

    Raises what `build_architecture` raises.
    """
    return plain_decoder(base, base.config, class_name) or build_architecture(base.config, class_name, task_type)


def plain_decoder(base: Checkpoint, config: Mapping[str, Any], class_name: str | None) -> Architecture | None:
    """The class `class_name` for `config`, if the table knows it, and `base` is what the table says; else None.

    Args:
        base: the base. A tied output head may be stored or not; tensors besides the class's may be there.
        config: the base's, or that of a model that is merged from it.
        class_name: of transformers.

    Returns: the same as `build_architecture`, without the `settings` of modules.
    """
    own = _architecture(base.config, class_name)
    if own is None:
        return None
    stored = {name: base.tensors[name].shape for name in own.shapes if name in base.tensors}
    if any(stored.get(name, shape if name in own.tied else None) != shape for name, shape in own.shapes.items()):
        return None
    return own if config is base.config else _architecture(config, class_name)


def _architecture(config: Mapping[str, Any], class_name: str | None) -> Architecture | None:
    decoder = DECODERS.get(str(config.get("model_type")))
    if decoder is None or decoder.name != class_name or config.get("auto_map"):
        return None
    sizes, is_tied = _sizes(config, decoder), config.get("tie_word_embeddings", decoder.is_tied)
    biased = {name: config.get(name, False) for name in decoder.biased_by}
    if sizes is None or not all(isinstance(one, bool) for one in (is_tied, *biased.values())):
        return None
    with_bias = decoder.biased.union(*(decoder.biased_by[name] for name, is_true in biased.items() if is_true))
    shapes, linear = _tensors(decoder, sizes, with_bias)

    @cache
    def built() -> Architecture:
        return build_architecture(config, class_name)

    def rename(name: str) -> tuple[str, str | None]:
        known = name in shapes or name.removesuffix(".bias") in linear or _STORED_BUFFER.fullmatch(name) is not None
        return (name, None) if known else built()._rename(name)

    return Architecture(
        name=decoder.name,
        shapes=shapes,
        linear=linear,
        tied={_HEAD: _EMBEDDING} if is_tied else {},
        prefix="model",
        num_labels=model_config.label_count(config),
        vocab_size=sizes["v"],
        transposed=frozenset(),
        settings={},
        embeddings=(_EMBEDDING, _HEAD),
        obstacles={},
        _rename=rename,
        _optional=(),
        _converters=(),
    )


def _sizes(config: Mapping[str, Any], decoder: _Decoder) -> dict[str, int] | None:
    """The sizes of the tensors, by the letters of the table; None if the config does not state enough."""
    stated: list[Any] = [config.get(name) for name in _SIZES]
    if any(type(size) is not int or size < 1 for size in stated):
        return None
    vocabulary, hidden, inner, layers, heads, kv_heads = map(int, stated)
    default = hidden // heads if decoder.head_dim_follows else None
    head_dim = config.get("head_dim", default)
    if type(head_dim) is not int or head_dim < 1 or hidden % heads:
        return None
    q, kv = heads * head_dim, kv_heads * head_dim
    found = {"v": vocabulary, "h": hidden, "i": inner, "2i": 2 * inner, "d": head_dim, "q": q, "kv": kv}
    return {**found, "qkv": q + 2 * kv, "layers": layers}


def _tensors(
    decoder: _Decoder, sizes: Mapping[str, int], with_bias: frozenset[str]
) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """The shapes of all tensors, and the names of the linear modules."""
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (sizes["v"], sizes["h"])}
    linear = {_HEAD.removesuffix(".weight")}
    for layer in range(sizes["layers"]):
        for module, (out, width) in decoder.linear.items():
            name = f"model.layers.{layer}.{module}"
            linear.add(name)
            shapes[f"{name}.weight"] = (sizes[out], sizes[width])
            if module in with_bias:
                shapes[f"{name}.bias"] = (sizes[out],)
        shapes |= {f"model.layers.{layer}.{norm}.weight": (sizes[size],) for norm, size in decoder.norms.items()}
    shapes |= {"model.norm.weight": (sizes["h"],), _HEAD: (sizes["v"], sizes["h"])}
    return shapes, frozenset(linear)
