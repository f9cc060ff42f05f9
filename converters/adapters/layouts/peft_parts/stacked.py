"""`layer_replication` of a LoraConfig: the adapter was trained on a stack of copies of the base's layers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.adapters.adapter import Adapter
from converters.errors import AdapterConfigError

FIELD = "layer_replication"


def on_stacked_layers(adapter: Adapter, where: Path, config: Mapping[str, Any]) -> Adapter:
    """The adapter with the stack that its config names, which is a part of its digest; itself if there is none.

    Raises `AdapterConfigError` if the field does not have PEFT's form.
    """
    given = config.get(FIELD)
    if not given:
        return adapter
    if not isinstance(given, list) or not all(_is_range(pair) for pair in given):
        raise AdapterConfigError(f"{where}: {FIELD} = {given!r}; expected a list of pairs [start, end] of layers")
    ranges = tuple((start, end) for start, end in given)
    digest = hashlib.sha256(json.dumps([adapter.digest, FIELD, ranges]).encode()).hexdigest()
    return replace(adapter, layer_replication=ranges, digest=digest)


def _is_range(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(layer) is int for layer in pair)
