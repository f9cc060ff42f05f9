"""The options of `merge`, `merge_each` and `export_onnx`, as objects. Importing them imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.adapters.opening import AdapterSpec


@dataclass(frozen=True)
class Sources:
    """Where the base and the adapters come from; see `converters.merge`.

    Attributes:
        base: local folder, Hub id or short name; `self` for the base weights inside the adapter; None where only the
            adapters are asked for.
        adapters: one adapter or several.
        revision: of a base on the Hub.
        adapter_revision: of an adapter on the Hub.
        token: Hub token.
        layout, scaling: for adapters that do not state them.
        stream: fetch a base on the Hub shard by shard.
        names_have_weights: a name like `style=0.5` is an adapter and its weight, as on the command line.
    """

    base: str | Path | None
    adapters: "AdapterSpec | Sequence[AdapterSpec]"
    revision: str | None = None
    adapter_revision: str | None = None
    token: str | None = None
    layout: str | None = None
    scaling: float | None = None
    stream: bool = False
    names_have_weights: bool = False


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is planned; see `converters.merge`.

    Attributes:
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        max_shard_size: like `5GB`; `base` for the base's own sharding.
        labels: class labels for a classification head that comes with the adapter.
        force_base: merge even if the adapter was trained on another base.
    """

    dtype: str = "auto"
    max_shard_size: str = "5GB"
    labels: list[str] | None = None
    force_base: bool = False
