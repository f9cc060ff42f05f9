"""How the tensors of an output are distributed over files."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from converters.files.names import SINGLE_FILE
from converters.models.checkpoint import Checkpoint
from converters.plans.tensor import TensorPlan


def shard_tensors(
    base: Checkpoint, tensors: Iterable[TensorPlan], max_shard_size: int | None, shared: Collection[str] = ()
) -> dict[str, tuple[TensorPlan, ...]]:
    """Distribute the tensors over files, in the base's order, so that reading is sequential.

    Args:
        base: the base.
        tensors: of the output.
        max_shard_size: bytes; None for the base's own sharding.
        shared: base tensors that several outputs have in common; they go into files of their own, and a file of
            the base that contains only such tensors stays as it is.
    """
    place = {name: i for i, name in enumerate(base.tensors)}
    shard_of = {name: base.shards.index(info.file.name) for name, info in base.tensors.items()}
    last = len(place)

    def order(tensor: TensorPlan) -> int:
        return place.get(tensor.source.name if tensor.source else tensor.name, last)

    groups: list[list[TensorPlan]]
    if max_shard_size is None:
        groups = [[] for _ in base.shards]
        for tensor in sorted(tensors, key=order):
            name = tensor.source.name if tensor.source else tensor.name
            groups[shard_of.get(name, len(groups) - 1)].append(tensor)
    else:
        mixed = {info.file for name, info in base.tensors.items() if name not in shared}
        whole: dict[Path, list[TensorPlan]] = {}
        parts: list[TensorPlan] = []
        changed: list[TensorPlan] = []
        for tensor in sorted(tensors, key=order):
            if tensor.source is None or not (tensor.is_untouched and tensor.name in shared):
                changed.append(tensor)
            elif tensor.source.file in mixed:
                parts.append(tensor)
            else:
                whole.setdefault(tensor.source.file, []).append(tensor)
        groups = [*whole.values(), *_by_size(parts, max_shard_size), *_by_size(changed, max_shard_size)]
    groups = [group for group in groups if group]
    if len(groups) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    # wide dtypes first: then every tensor begins at a multiple of its item size, as the format recommends
    return {name: tuple(sorted(group, key=_alignment)) for name, group in zip(names, groups, strict=True)}


def _by_size(tensors: Iterable[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def _alignment(tensor: TensorPlan) -> int:
    bits = re.search(r"\d+", tensor.dtype)  # BF16 -> 16; BOOL has none
    return -int(bits.group()) if bits else -8
