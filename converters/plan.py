"""What will happen to each tensor of a merge. Everything that can be refused is refused here."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from converters import model_config
from converters.adapter import Adapter
from converters.checkpoint import SINGLE_FILE, Checkpoint
from converters.errors import OptionError, QuantizedBaseError
from converters.identity import check_base
from converters.renamed_targets import find_renamed_targets
from converters.targets import Targets, find_direct_targets
from converters.tensor_file import FLOAT_DTYPES, TensorInfo, TensorSpec
from converters.tweaker import check_fits

DTYPE_OPTIONS = {"auto": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


class Action(str, Enum):
    """What a merge does to a tensor."""

    KEPT = "kept"  # the base's bytes, or its numbers in another dtype
    UPDATED = "updated"  # W0 + f(W0; θ)
    REPLACED = "replaced"  # from modules_to_save, in place of the base's
    ADDED = "added"  # new to the base: a head, or an untied output embedding


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output."""

    name: str
    action: Action
    dtype: str  # of the output, as safetensors spells it
    shape: tuple[int, ...]
    source: TensorInfo | None  # in the base: W0, or what is kept
    module: str | None = None  # adapted module whose θ applies
    saved: str | None = None  # tensor of modules_to_save

    @property
    def nbytes(self) -> int:
        """Size in the output."""
        if self.dtype in FLOAT_DTYPES:
            return math.prod(self.shape) * FLOAT_DTYPES[self.dtype].itemsize
        if self.source is None:
            raise ValueError(f"{self.name}: not floating, and not from the base")
        return self.source.nbytes

    @property
    def spec(self) -> TensorSpec:
        """The header entry of the output."""
        return TensorSpec(self.name, self.dtype, self.shape, self.nbytes)


@dataclass(frozen=True)
class Plan:
    """A merge that can be carried out."""

    base: Checkpoint
    adapter: Adapter
    shards: Mapping[str, tuple[TensorPlan, ...]]  # file name -> tensors in file order
    dropped: Mapping[str, str]  # base tensor -> why it is left out
    config: Mapping[str, Any]
    options: Mapping[str, Any]  # what was chosen, for the manifest
    notes: tuple[str, ...]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """All tensors of the output."""
        return tuple(tensor for shard in self.shards.values() for tensor in shard)

    @property
    def total_size(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_merge(
    base: Checkpoint,
    adapter: Adapter,
    *,
    dtype: str = "auto",
    max_shard_size: int | None = None,
    labels: list[str] | None = None,
    force_base: bool = False,
) -> Plan:
    """Plan a merge, reading no weights.

    Args:
        base: the base.
        adapter: the adapter.
        dtype: `auto` (each tensor's own), `bf16`, `fp16` or `fp32`.
        max_shard_size: bytes; None for the base's own sharding.
        labels: class labels for a head that comes with the adapter.
        force_base: merge although the recorded base is another.

    Raises:
        BaseMismatchError, QuantizedBaseError, TargetError, ThetaError, OptionError: see there.
    """
    if dtype not in DTYPE_OPTIONS:
        raise OptionError(f"dtype {dtype!r} is unknown; wanted {', '.join(DTYPE_OPTIONS)}")
    identity_notes = check_base(base, adapter, force_base)
    found = find_direct_targets(base, adapter) if labels is None else None
    if found is None:
        found = find_renamed_targets(base, adapter, labels)
    tensors = [
        *_kept(base, found, dtype),
        *_updated(base, adapter, found, dtype),
        *_replaced(base, adapter, found, dtype),
    ]
    shards = _shard(base, tensors, max_shard_size)
    output_dtype = DTYPE_OPTIONS[dtype] or _main_dtype(tensors)
    return Plan(
        base=base,
        adapter=adapter,
        shards=shards,
        dropped=found.dropped,
        config=model_config.with_dtype(found.config, output_dtype),
        options={"dtype": dtype, "max_shard_size": max_shard_size, "labels": labels, "force_base": force_base},
        notes=(*identity_notes, *found.notes),
    )


def _kept(base: Checkpoint, found: Targets, dtype: str) -> Iterator[TensorPlan]:
    for output, name in found.kept.items():
        info = base.tensors[name]
        own = output in base.tensors or output.endswith(f".{name}")  # else a copy under another name
        yield TensorPlan(output, Action.KEPT if own else Action.ADDED, _dtype_of(info.dtype, dtype), info.shape, info)


def _updated(base: Checkpoint, adapter: Adapter, found: Targets, dtype: str) -> Iterator[TensorPlan]:
    kept = set(found.kept.values())
    for target in found.targets:
        info, theta = base.tensors[target.base_name], adapter.modules[target.module]
        check_fits(theta.orientation, theta.size, info.shape, info.name)
        if not info.is_float:
            raise QuantizedBaseError(f"{info.name} is {info.dtype}; wanted a floating-point weight to merge into")
        beside = target.output_name not in base.tensors and info.name in kept  # a head that was tied to it
        action = Action.ADDED if beside else Action.UPDATED
        yield TensorPlan(target.output_name, action, _dtype_of(info.dtype, dtype), info.shape, info, target.module)


def _replaced(base: Checkpoint, adapter: Adapter, found: Targets, dtype: str) -> Iterator[TensorPlan]:
    main = _main_dtype(base.tensors.values())
    for output, saved in found.replaced.items():
        known = base.tensors.get(output)
        own = known.dtype if known is not None and known.is_float else main
        shape = adapter.store.shapes[adapter.saved[saved]]
        action = Action.ADDED if known is None else Action.REPLACED
        yield TensorPlan(output, action, _dtype_of(own, dtype), shape, None, saved=saved)


def _dtype_of(own: str, option: str) -> str:
    wanted = DTYPE_OPTIONS[option]
    return wanted if wanted is not None and own in FLOAT_DTYPES else own


def _main_dtype(tensors: Iterable[TensorInfo | TensorPlan]) -> str:
    """The floating dtype of most numbers."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOAT_DTYPES:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else "F32"


def _shard(
    base: Checkpoint, tensors: list[TensorPlan], max_shard_size: int | None
) -> dict[str, tuple[TensorPlan, ...]]:
    """Spread the tensors over files, in the base's order, so that reading is sequential."""
    place = {name: i for i, name in enumerate(base.tensors)}
    shard_of = {name: base.shards.index(info.file.name) for name, info in base.tensors.items()}
    last = len(place)

    def order(tensor: TensorPlan) -> int:
        return place.get(tensor.source.name if tensor.source else tensor.name, last)

    groups: list[list[TensorPlan]] = [[]]
    if max_shard_size is None:
        groups = [[] for _ in base.shards]
        for tensor in sorted(tensors, key=order):
            name = tensor.source.name if tensor.source else tensor.name
            groups[shard_of.get(name, len(groups) - 1)].append(tensor)
    else:
        size = 0
        for tensor in sorted(tensors, key=order):
            if groups[-1] and size + tensor.nbytes > max_shard_size:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += tensor.nbytes
    groups = [group for group in groups if group]
    if len(groups) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    # wide dtypes first: then every tensor begins at a multiple of its item size, as the format recommends
    return {name: tuple(sorted(group, key=_alignment)) for name, group in zip(names, groups, strict=True)}


def _alignment(tensor: TensorPlan) -> int:
    bits = re.search(r"\d+", tensor.dtype)  # BF16 -> 16; BOOL has none
    return -int(bits.group()) if bits else -8


def parse_size(text: str) -> int | None:
    """Bytes of '5GB', '500MB', '2GiB'; None for 'base', the base's own sharding.

    Raises `OptionError` for anything else.
    """
    if text == "base":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|K|M|G|T)(i?)B", text.strip(), re.IGNORECASE)
    size = 0
    if found:
        power = " KMGT".index(found[2].upper() or " ")
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if size <= 0:
        raise OptionError(f"'{text}' is no size; wanted something like 5GB, 500MB, 2GiB, or 'base'")
    return size
