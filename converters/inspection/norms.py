"""How much an adapter changes each module of its base, and recording that base."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from converters.adapters.adapter import Adapter, Weighted
from converters.adapters.base_record import write_base_record
from converters.adapters.facts import shortened, split_module
from converters.errors import OptionError, OutputError
from converters.files.blocks import block_rows
from converters.files.reader import TensorReader
from converters.models.checkpoint import Checkpoint
from converters.plans.merge import plan_merge


@dataclass(frozen=True)
class DeltaNorm:
    """The size of one update: the Frobenius norms of the delta and of W0."""

    module: str
    shape: tuple[int, int]  # (out, in)
    delta: float
    weight: float

    @property
    def relative(self) -> float:
        """The norm of the delta divided by the norm of the weight."""
        return self.delta / self.weight if self.weight else float("inf")


def delta_norms(
    adapter: Adapter, base: Checkpoint, advance: Callable[[int], None] = lambda count: None
) -> list[DeltaNorm]:
    """The norm of every update and of its weight, in layer order. Only one block is in memory at a time.

    `advance` is called with the number of modules done. Raises the errors of `plan_merge` if the adapter does not
    belong to the base.
    """
    plan = plan_merge(base, [Weighted(adapter)])
    found = []
    cpu = torch.device("cpu")
    with TensorReader() as reader:
        for tensor in plan.tensors:
            for term in tensor.terms:
                beside = term.parameter != "weight" and adapter.describe(term.module).changes_weight
                if tensor.source is None or beside:
                    continue
                shape = tensor.matrix_shape
                info = tensor.source.as_matrix(shape)
                blocks = partial(reader.row_blocks, info, block_rows(info.row_size))
                norm = plan.delta_of(term).update(shape, torch.float32, cpu).norm(blocks)
                squares = sum(float(b.float().square().sum(dtype=torch.float64)) for b in blocks())
                found.append(DeltaNorm(term.module, shape, norm, squares**0.5))
                advance(1)
    return sorted(
        _summed(found), key=lambda norm: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", norm.module)]
    )


def _summed(norms: Sequence[DeltaNorm]) -> Iterator[DeltaNorm]:
    """One for each module: the tensors of its experts, if they are stored one by one, are taken together."""
    groups: dict[str, list[DeltaNorm]] = {}
    for norm in norms:
        groups.setdefault(norm.module, []).append(norm)
    for module, parts in groups.items():
        delta, weight = (math.hypot(*(getattr(part, side) for part in parts)) for side in ("delta", "weight"))
        yield DeltaNorm(module, (sum(part.shape[0] for part in parts), parts[0].shape[1]), delta, weight)


def norm_table(norms: Sequence[DeltaNorm]) -> tuple[list[str], list[str], dict[str, dict[str, float]]]:
    """Relative norms as (layers, kinds of module, layer -> kind -> norm), layers in order, names shortened."""
    cells: dict[str, dict[str, float]] = {}
    for norm in norms:
        layer, kind = split_module(norm.module)
        cells.setdefault(layer, {})[kind] = norm.relative
    kinds = shortened({kind for row in cells.values() for kind in row})
    layers = shortened(cells, least=2)
    named = {layers[layer]: {kinds[kind]: value for kind, value in row.items()} for layer, row in cells.items()}
    return list(named), sorted(kinds.values()), named


def record_base(adapter: Adapter, base: Checkpoint) -> Path:
    """Write the identity of the base to the adapter's folder, so that any other base is refused from then on.

    The adapter is checked against the base first. Returns the file, `peanut_base.json`.

    Raises `OptionError` if the adapter is not a local folder, `OutputError` if the file cannot be written.
    """
    if adapter.repo_id is not None or not adapter.path.is_dir():
        raise OptionError(f"the base can only be recorded in a local adapter folder, and {adapter.path} is not one")
    plan_merge(base, [Weighted(adapter)], force_base=True)
    try:
        return write_base_record(adapter.folder, base)
    except OSError as error:
        raise OutputError(f"the base could not be recorded in {adapter.folder}: {error}") from error
