"""Trained tokens beside LoRA: `LoraConfig(trainable_token_indices=...)`.

They are saved as `<module>.token_adapter.trainable_tokens_delta`, where the module is the input embedding, or each
that a table of indices names (`peft/utils/other.py`). What is tied to the input embedding and has the same indices is
left out.
"""

from collections.abc import Mapping
from typing import Any

import torch

from converters.adapters.adapter import ModuleTheta
from converters.adapters.layouts.peft_config import located
from converters.adapters.source import AdapterSource
from converters.errors import AdapterConfigError, ThetaError
from converters.methods.multiplicative.trainable_tokens import TrainableTokens, token_settings

TOKENS = "rows"  # the part of θ
_HEADS = ("lm_head", "embed_out")
TOKENS_FIELD = "trainable_token_indices"
TOKENS_PARAMETER = "trainable_tokens_delta"
_WRAPPER = ".token_adapter"


def read_tokens(source: AdapterSource, parts: Mapping[str, Mapping[str, str]]) -> dict[str, ModuleTheta]:
    """θ of the modules that have trained tokens.

    Args:
        source: the adapter.
        parts: module -> part of θ -> key, of all modules.

    Raises:
        AdapterConfigError: the indices do not have PEFT's form, or belong to other modules.
        ThetaError: a module has trained tokens and LoRA, or tokens of the config have no rows.
    """
    where = source.config_path or source.path
    given = (source.config or {}).get(TOKENS_FIELD)
    found = {module.removesuffix(_WRAPPER): keys for module, keys in sorted(parts.items()) if TOKENS in keys}
    if isinstance(given, list):
        found = _without_tied_head(source, found)
    if given in (None, [], {}):
        if found:
            raise AdapterConfigError(
                f"{where}: {next(iter(found))} has trained tokens, and only {TOKENS_FIELD} of the config says which; "
                "config and weights come from different trainings"
            )
        return {}
    modules: dict[str, ModuleTheta] = {}
    for module, keys in found.items():
        if len(keys) > 1 or module in parts:
            raise ThetaError(f"{source.path}: {module} has trained tokens and LoRA, which PEFT does not combine")
        with located(where):
            modules[module] = ModuleTheta(
                TrainableTokens, keys, token_settings(TOKENS_FIELD, _indices(given, module))
            )
    _check_complete(source, given, found)
    return modules


def _without_tied_head(source: AdapterSource, found: dict[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    """Without the tokens of an output head that repeat those of the embedding.

    PEFT saves them where it saves the embeddings whole, after the vocabulary was resized.
    """
    heads = [module for module in found if module.rsplit(".", 1)[-1] in _HEADS]
    if len(found) != 2 or len(heads) != 1:
        return found
    one, two = (source.store.tensor(keys[TOKENS]) for keys in found.values())
    return {module: keys for module, keys in found.items() if not (torch.equal(one, two) and module in heads)}


def _indices(given: Any, module: str) -> Any:
    """The indices of one module. Raises `AdapterConfigError` if the config has none for it."""
    if not isinstance(given, dict):
        return given
    name = _name(given, module)
    if name is None:
        raise AdapterConfigError(
            f"{TOKENS_FIELD} names {', '.join(given)}, the weights have trained tokens of {module}; config and "
            "weights come from different trainings"
        )
    return given[name]


def _name(given: Mapping[str, Any], module: str) -> str | None:
    return next((name for name in given if module == name or module.endswith(f".{name}")), None)


def _check_complete(source: AdapterSource, given: Any, found: Mapping[str, Any]) -> None:
    """Check that the tokens of the config have rows: of a list those of one module, of a table those of each."""
    if not isinstance(given, dict):
        if len(found) != 1:
            names = ", ".join(found) or "none"
            raise ThetaError(
                f"{source.weights}: {TOKENS_FIELD} is a list, for the input embedding; the weights have trained "
                f"tokens of {names}; the adapter is incomplete, or was put together"
            )
        return
    known = {name for module in found if (name := _name(given, module)) is not None}
    for name, indices in given.items():
        if name not in known and not any(given[other] == indices for other in known):  # else left out by the tie
            raise ThetaError(
                f"{source.weights}: no trained tokens of {name}, which {TOKENS_FIELD} of the config names"
            )
