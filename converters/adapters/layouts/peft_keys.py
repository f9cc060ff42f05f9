"""The keys of PEFT's state dicts, as saved (`...lora_A.weight`) and as in memory (`...lora_A.default.weight`).

`save_pretrained` leaves the adapter's name out and saves only what was trained. `torch.save(model.state_dict())`
keeps the name, and the base weights as `<module>.base_layer.weight` (`peft/utils/save_and_load.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.adapters.source import AdapterSource
from converters.errors import ThetaError

# input and output embeddings, whose base weights PEFT may save
EMBEDDING_NAMES = "embed_tokens|lm_head|wte|word_embeddings|shared|embed_in|embed_out"

_SAVED = "modules_to_save"
_EMBEDDING_BASE = re.compile(rf"(.*\.)?({EMBEDDING_NAMES})(\.token_adapter)?\.base_layer\.weight")
_ORIGINAL = re.compile(r"(?P<module>.+?)\.original_module\.(?P<rest>.+)")
_BEFORE = re.compile(r"\.(original_module|trainable_tokens_original)\.")  # what trained modules, or rows, replace


@dataclass
class PeftKeys:
    """The keys of one adapter, sorted.

    Attributes:
        parts: adapted module -> part of θ (`A`, `encoders.0`, ...) -> key in the store.
        shared: part of θ that all modules share -> key.
        grouped: part of θ that the modules of a group share -> group -> key.
        saved: tensor that is replaced whole -> key.
        replaced: of the modules of `saved`, those that are under `whole`.
        embedded: base tensor that was saved along -> key.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    grouped: dict[str, dict[str, str]] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    embedded: dict[str, str] = field(default_factory=dict)


def sort_keys(
    source: AdapterSource,
    parameters: Mapping[str, str],
    mark: str,
    bias: str = "none",
    shared: Mapping[str, str] | None = None,
    grouped: Mapping[str, str] | None = None,
    ignored: re.Pattern[str] | None = None,
    whole: str | None = None,
) -> PeftKeys:
    """Sort the keys of a state dict.

    Args:
        source: the adapter.
        parameters: name of a parameter of θ in a state dict (`lora_A`, `psoft_R.vector_a`) -> part of θ. A key has
            perhaps the adapter's name, a number (in a list of parameters) and `.weight` after the (first) name.
        mark: part of every key of θ; a key that contains it and does not match is refused.
        bias: of the config: with `all`, or `lora_only` for those of the adapted modules, biases are trained and
            replace the base's.
        shared: name of a tensor that belongs to all modules (`vera_A`) -> part of θ.
        grouped: name of a tensor that belongs to a group of modules (`frod_V`, as `frod_V.<group>`) -> part of θ.
        ignored: what matches a key without effect on a trained adapter.
        whole: what holds trained copies of modules (`ln_tuning_layers`), where no other θ is needed.

    Raises:
        ThetaError: a key does not have PEFT's form, there is no θ, or there are several adapters.
    """
    where, theta_key, shared_key = source.weights, _theta_key(parameters), _shared_key(shared or {})
    group_key, saved_key = _group_key(grouped or {}), _saved_key(whole)
    whole_model, copied = _is_whole_model(source), _copied(source)
    found, adapters = PeftKeys(), set()
    for name, key in source.keys.items():
        if ignored is not None and ignored.fullmatch(name):
            continue
        if shared and (match := shared_key.fullmatch(name)):
            found.shared[shared[match["parameter"]]] = key
        elif grouped and (match := group_key.fullmatch(name)):
            found.grouped.setdefault(grouped[match["parameter"]], {})[match["group"]] = key
        elif (match := theta_key.fullmatch(name)) and (parameter := _parameter(match, parameters)) is not None:
            adapters.add(match["name"])
            part = parameters[parameter] + (f".{int(match['index'])}" if match["index"] else "")
            if part in found.parts.setdefault(match["module"], {}):
                _refuse_several(where, adapters)
            found.parts[match["module"]][part] = key
        elif match := saved_key.fullmatch(name):
            adapter, saved = _split_saved(match["module"], match["rest"], copied)
            adapters.add(adapter)
            found.saved[saved] = source.keys.get(saved, key)  # PEFT loads the shorter one, where both are there
            found.replaced |= {match["module"]} if match["holder"] == whole else set()
        elif mark in name:
            raise ThetaError(f"{where}: the key {key} does not have PEFT's form")
        elif not _BEFORE.search(name):
            _place_plain(found, name, key, bias, whole_model)
    if not found.parts and (whole is None or not found.saved):
        raise ThetaError(f"{where}: the weights contain no θ (no key with {whole or mark + 'A'}); nothing to merge")
    if len(adapters - {None}) > 1:
        _refuse_several(where, adapters)
    if bias == "lora_only" and whole_model:
        _embed_other_biases(found)
    return found


def _embed_other_biases(found: PeftKeys) -> None:
    """Only biases of adapted modules were trained; the others are those of the base."""
    for name in [n for n in found.saved if n.endswith(".bias") and n[:-5] not in found.parts]:
        found.embedded[name] = found.saved.pop(name)


def _theta_key(parameters: Mapping[str, str]) -> re.Pattern[str]:
    """What matches a key of θ."""
    heads = "|".join(dict.fromkeys(re.escape(name.partition(".")[0]) for name in parameters))
    tails = "|".join(sorted({"weight"} | {re.escape(name.partition(".")[2]) for name in parameters if "." in name}))
    adapter, index = rf"(?:\.(?P<name>(?!(?:{tails})$)[^.\d][^.]*))?", r"(?:\.(?P<index>\d+))?"
    return re.compile(rf"(?P<module>.+)\.(?P<parameter>{heads}){adapter}{index}(?:\.(?P<tail>{tails}))?")


def _parameter(match: re.Match[str], parameters: Mapping[str, str]) -> str | None:
    """The name in `parameters` of what `_theta_key` found; None if it is not there."""
    head, tail = match["parameter"], match["tail"]
    if f"{head}.{tail}" in parameters:
        return f"{head}.{tail}"
    return head if head in parameters and tail in (None, "weight") else None


def _place_plain(found: PeftKeys, name: str, key: str, bias: str, whole_model: bool) -> None:
    """Sort a key without a name of PEFT in it, or with `base_layer`: trained whole, or of the base."""
    plain = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
    is_trained_bias = plain.endswith(".bias") and bias != "none"
    trained = is_trained_bias or (plain == name and not whole_model)
    (found.saved if trained else found.embedded)[plain] = key


def _is_whole_model(source: AdapterSource) -> bool:
    """Whether it has the weights of the base, other than of embeddings, which PEFT may save along."""
    bases = [name for name in source.keys if name.endswith(".base_layer.weight")]
    originals = [match for match in map(_ORIGINAL.fullmatch, source.keys) if match and match[0].endswith(".weight")]
    # of a resized embedding, PEFT saves the original and the trained copy once more beside `lm_head.weight`
    replaced = any(f"{match['module']}.{match['rest']}" not in source.keys for match in originals)
    return replaced or not all(map(_EMBEDDING_BASE.fullmatch, bases))


def _copied(source: AdapterSource) -> dict[str, set[str]]:
    """Module -> names in it, of the originals of trained copies: with `bias="all"`, or in a state dict in memory."""
    found: dict[str, set[str]] = {}
    for match in filter(None, map(_ORIGINAL.fullmatch, source.keys)):
        found.setdefault(match["module"], set()).add(match["rest"])
    return found


def _split_saved(module: str, rest: str, copied: Mapping[str, set[str]]) -> tuple[str | None, str]:
    """The name of the adapter, if there is one in what follows a holder in a key, and the tensor's."""
    first, dot, parameter = rest.partition(".")
    has_name = dot and rest not in copied.get(module, ())
    return (first, f"{module}.{parameter}") if has_name else (None, f"{module}.{rest}")


def _group_key(grouped: Mapping[str, str]) -> re.Pattern[str]:
    """What matches the key of a tensor of a group of modules."""
    names = "|".join(map(re.escape, grouped))
    return re.compile(rf"(?:base_model\.)?(?P<parameter>{names})\.(?P<group>[^.]+)")


def _saved_key(whole: str | None) -> re.Pattern[str]:
    """What matches the key of a tensor of a module that is replaced whole."""
    holders = "|".join(map(re.escape, filter(None, (_SAVED, whole))))
    return re.compile(rf"(?P<module>.+)\.(?P<holder>{holders})\.(?P<rest>.+)")


def _shared_key(shared: Mapping[str, str]) -> re.Pattern[str]:
    """What matches the key of a tensor of the whole adapter."""
    names = "|".join(map(re.escape, shared))
    return re.compile(rf"(base_model\.)?(?P<parameter>{names})(\.[^.]+)?")


def _refuse_several(where: Path, adapters: set[str | None]) -> None:
    names = ", ".join(sorted(str(name) for name in adapters if name is not None))
    raise ThetaError(f"{where}: θ of several adapters ({names}) in one file; save only the one to use")
