"""Changes to a model's config.json that keep it consistent with the merged weights."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

# safetensors dtype -> its name in configs
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and earlier versions
_TIE = "tie_word_embeddings"
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


# how transformers writes numbers that JSON does not have (`configuration_utils.py`, `_encode_special_floats`)
_TAGGED = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def untagged(value: Any) -> Any:
    """A config, or a value of one, with the numbers that stand in it as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        tag = value.get("__float__") if len(value) == 1 else None
        if isinstance(tag, str) and tag in _TAGGED:
            return _TAGGED[tag]
        return {key: untagged(one) for key, one in value.items()}
    return [untagged(one) for one in value] if isinstance(value, list) else value


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of `config` with this dtype, under either key and in every nested config that states one."""
    changed = _map_nested(config, _DTYPE_KEYS, CONFIG_DTYPES[dtype])
    if not any(key in changed for key in _DTYPE_KEYS):
        changed["dtype"] = CONFIG_DTYPES[dtype]
    return changed


def with_vocab_size(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """A copy of `config` in which every vocabulary size `old` is replaced with `new`, or one is added."""
    changed = _map_nested(config, ("vocab_size",), new, only=old)
    return changed if changed != config else {**changed, "vocab_size": new}


def with_layers(config: Mapping[str, Any], count: int, sources: Sequence[int]) -> dict[str, Any]:
    """A copy of `config` for a stack of layers that are copies of those of `config`.

    Lists with an entry for each layer (`layer_types`) get the entries of the layers that were copied.

    Args:
        config: of a model with `count` layers.
        count: their number.
        sources: for each layer of the stack, the one that it is a copy of.
    """
    changed = copy.deepcopy(dict(config))
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            changed[key] = [value[source] for source in sources]
    counts = [key for key in _LAYER_COUNTS if config.get(key) == count] or _LAYER_COUNTS[:1]
    return changed | dict.fromkeys(counts, len(sources))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` that does not tie the output head to the input embedding."""
    return {**_map_nested(config, (_TIE,), False), _TIE: False}


def with_labels(config: Mapping[str, Any], labels: list[str]) -> dict[str, Any]:
    """A copy of `config` with these class labels."""
    changed = copy.deepcopy(dict(config))
    changed["id2label"] = {str(i): label for i, label in enumerate(labels)}
    changed["label2id"] = {label: i for i, label in enumerate(labels)}
    if "num_labels" in changed:  # some classes take this number rather than count the labels
        changed["num_labels"] = len(labels)
    return changed


def pad_token_of(config: Mapping[str, Any]) -> int | None:
    """The id of the pad token that a config states; -1, as in some configs, is none."""
    text = config.get("text_config")
    for one in (config, text if isinstance(text, dict) else {}):
        if isinstance(one.get("pad_token_id"), int):
            return int(one["pad_token_id"]) if one["pad_token_id"] >= 0 else None
    return None


def with_pad_token(config: Mapping[str, Any], token: int) -> dict[str, Any]:
    """A copy of `config` with this pad token, in the config of its language model as well."""
    changed = {**copy.deepcopy(dict(config)), "pad_token_id": token}
    if isinstance(changed.get("text_config"), dict):
        changed["text_config"]["pad_token_id"] = token
    return changed


def labels_of(config: Mapping[str, Any]) -> list[str] | None:
    """The class labels of a config in order, or None if it has none or they are not numbered from 0."""
    table = config.get("id2label")
    if not isinstance(table, dict) or set(table) != {str(i) for i in range(len(table))}:
        return None
    return [str(table[str(i)]) for i in range(len(table))] or None


def label_count(config: Mapping[str, Any]) -> int:
    """How many labels a config states, or implies: transformers counts two where it names none."""
    stated, labels = config.get("num_labels"), config.get("id2label")
    if type(stated) is int and stated > 0:
        return stated
    return len(labels) if isinstance(labels, dict) else 2


def _map_nested(config: Mapping[str, Any], keys: tuple[str, ...], value: Any, only: Any = None) -> dict[str, Any]:
    """A copy of `config` with existing `keys`, at any depth, set to `value`; with `only`, just those that had it."""
    changed: dict[str, Any] = {}
    for key, old in config.items():
        if key in keys and (only is None or old == only):
            changed[key] = value
        else:
            changed[key] = _map_nested(old, keys, value, only) if isinstance(old, dict) else copy.deepcopy(old)
    return changed
