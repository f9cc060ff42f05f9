"""How strongly an adapter acts where, on its base."""

import re
from collections.abc import Callable, Sequence
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
    """How large one update is: Frobenius norms of the delta and of W0."""

    module: str
    shape: tuple[int, int]  # (out, in)
    delta: float
    weight: float

    @property
    def relative(self) -> float:
        """Norm of the delta relative to its weight."""
        return self.delta / self.weight if self.weight else float("inf")


def delta_norms(
    adapter: Adapter, base: Checkpoint, advance: Callable[[int], None] = lambda count: None
) -> list[DeltaNorm]:
    """The norm of every update and of its weight, in layer order. Holds one block at a time.

    Raises what `plan_merge` raises when the adapter does not belong to the base; `advance` counts modules.
    """
    plan = plan_merge(base, [Weighted(adapter)])
    found = []
    cpu = torch.device("cpu")
    with TensorReader() as reader:
        for tensor in plan.tensors:
            for term in tensor.terms:
                if tensor.source is None or term.parameter != "weight":
                    continue
                info, shape = tensor.source, (tensor.source.shape[0], tensor.source.shape[1])
                blocks = partial(reader.row_blocks, info, block_rows(info.row_size))
                norm = plan.delta_of(term).update(shape, torch.float32, cpu).norm(blocks)
                squares = sum(float(b.float().square().sum(dtype=torch.float64)) for b in blocks())
                found.append(DeltaNorm(term.module, shape, norm, squares**0.5))
                advance(1)
    return sorted(found, key=lambda norm: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", norm.module)])


def norm_table(norms: Sequence[DeltaNorm]) -> tuple[list[str], list[str], dict[str, dict[str, float]]]:
    """Relative norms as a table: (layers, kinds of module, layer -> kind -> norm), layers in order, names short."""
    cells: dict[str, dict[str, float]] = {}
    for norm in norms:
        layer, kind = split_module(norm.module)
        cells.setdefault(layer, {})[kind] = norm.relative
    kinds = shortened({kind for row in cells.values() for kind in row})
    layers = shortened(cells, least=2)
    named = {layers[layer]: {kinds[kind]: value for kind, value in row.items()} for layer, row in cells.items()}
    return list(named), sorted(kinds.values()), named


def record_base(adapter: Adapter, base: Checkpoint) -> Path:
    """Write the base's identity beside the adapter, so that every other base is refused from then on.

    Checks first that the adapter fits the base. Returns the file, `peanut_base.json`.

    Raises `OptionError` for an adapter that is no local folder, `OutputError` when it cannot be written.
    """
    if adapter.repo_id is not None or not adapter.path.is_dir():
        raise OptionError(f"the base can be recorded in an adapter's own folder only, and {adapter.path} is none")
    plan_merge(base, [Weighted(adapter)], force_base=True)
    try:
        return write_base_record(adapter.folder, base)
    except OSError as error:
        raise OutputError(f"the base could not be recorded in {adapter.folder}: {error}") from error
