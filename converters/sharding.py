"""How the tensors of an output are spread over files."""

import re

from converters.checkpoint import SINGLE_FILE, Checkpoint
from converters.errors import OptionError
from converters.tensor_plan import TensorPlan


def shard_tensors(
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
