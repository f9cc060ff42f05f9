"""How transformers makes the tensors of a model from those of a checkpoint, where they are not the same.

transformers fuses and splits tensors while it loads them (`transformers/conversion_mapping.py`,
`core_model_loading.py`). Three forms are known here: experts that a checkpoint stores one by one, weights that it
stores as one, and experts that it may store with in and out swapped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversion:
    """What becomes of one tensor of a checkpoint.

    Attributes:
        targets: tensors in memory. If there are several, the rows of the stored tensor are split among them evenly.
        expert: the index of the target's first axis that the stored tensor is; None if it is not of an expert.
        part, parts: which of so many equal parts of the target's second axis it is.
        swaps: it is (experts, in, out) of a target (experts, out, in), if it does not have the target's shape.
    """

    targets: tuple[str, ...]
    expert: int | None = None
    part: int = 0
    parts: int = 1
    swaps: bool = False


def find_conversion(name: str, canonical: str, pattern: str, converters: Sequence[Any]) -> Conversion | None:
    """The conversion of a tensor; None for one of a form that is not known here.

    Args:
        name: in the checkpoint.
        canonical: of the (first) tensor it becomes, in memory.
        pattern: that matched it, of one of the converters.
        converters: transformers' `WeightConverter`s of the model.
    """
    found = [c for c in converters if pattern in c.source_patterns and c.target_patterns[0] in canonical]
    if len(found) != 1:
        return None
    converter = found[0]
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    if any(getattr(op, "num_shards_attribute", None) for op in converter.operations):
        return None
    if operations == [("Chunk", 0)]:
        first, *others = converter.target_patterns
        if any("\\" in target or "*" in target for target in (first, *others)):
            return None
        before, _, after = canonical.rpartition(first)
        return Conversion((canonical, *(before + other + after for other in others)))
    sources = converter.source_patterns
    swapped = [(getattr(op, "dim0", None), getattr(op, "dim1", None)) for op in converter.operations]
    if operations == [("Transpose", None)] and swapped == [(1, 2)] and converter.operations[0].check_dims:
        return Conversion((canonical,), swaps=True)
    whole = operations == [("MergeModulelist", 0)] and len(sources) == 1
    if whole or operations == [("MergeModulelist", 0), ("Concatenate", 1)]:
        numbers = re.findall(r"experts\.(\d+)\.", name)
        if len(numbers) != 1 or len(converter.target_patterns) != 1:
            return None
        return Conversion((canonical,), int(numbers[0]), sources.index(pattern), len(sources))
    return None
