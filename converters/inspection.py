"""What an adapter is, and with a base, how strongly it acts where."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.adapter import Adapter
from converters.checkpoint import Checkpoint
from converters.identity import write_base_record
from converters.plan import plan_merge
from converters.tensor_file import TensorReader
from converters.tweaker import block_rows, factors_of_blocks


@dataclass(frozen=True)
class DeltaNorm:
    """How large one update is: Frobenius norms of f(W0; θ) and W0."""

    module: str
    shape: tuple[int, int]  # (out, in)
    delta: float
    weight: float

    @property
    def relative(self) -> float:
        """Norm of the delta relative to its weight."""
        return self.delta / self.weight if self.weight else float("inf")


def describe(adapter: Adapter) -> dict[str, Any]:
    """The facts of an adapter, as JSON has them."""
    thetas = list(adapter.modules.values())
    kinds = sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})

    def one_or_many(values: set[Any]) -> Any:
        return next(iter(values)) if len(values) == 1 else sorted(values)

    return {
        "adapter": adapter.name,
        "layout": adapter.layout,
        "evidence": adapter.evidence,
        "kind": "PEANuT",
        "orientation": one_or_many({theta.orientation.value for theta in thetas}),
        "r": one_or_many({theta.r for theta in thetas}),
        "depth": one_or_many({theta.depth for theta in thetas}),
        "act_fn": one_or_many({theta.act_fn for theta in thetas}),
        "scaling": one_or_many({theta.scaling for theta in thetas}),
        "parameters": adapter.parameter_count,
        "modules": len(adapter.modules),
        "targets": kinds,
        "modules_to_save": sorted(adapter.saved),
        "trained_on": adapter.base_name,
        "task_type": adapter.task_type,
        "recorded_base": adapter.base_fingerprint,
        "digest": adapter.digest,
    }


def delta_norms(
    adapter: Adapter, base: Checkpoint, advance: Callable[[int], None] = lambda count: None
) -> list[DeltaNorm]:
    """The norm of every update and of its weight, in layer order. Holds one block at a time.

    Raises what `plan_merge` raises when the adapter does not belong to the base; `advance` counts modules.
    """
    plan = plan_merge(base, adapter)
    found = []
    with TensorReader() as reader:
        for tensor in plan.tensors:
            if tensor.module is None or tensor.source is None:
                continue
            info, tweaker = tensor.source, adapter.tweaker(tensor.module)
            rows, dtype = block_rows(info.row_size), torch.float32
            shape = (info.shape[0], info.shape[1])
            cpu = torch.device("cpu")
            factors = factors_of_blocks(reader.row_blocks(info, rows), shape, tweaker, dtype, cpu)
            squares = sum(float(b.to(dtype).square().sum(dtype=torch.float64)) for b in reader.row_blocks(info, rows))
            found.append(DeltaNorm(tensor.module, shape, factors.norm(), squares**0.5))
            advance(1)
    return sorted(found, key=lambda norm: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", norm.module)])


def record_base(adapter: Adapter, base: Checkpoint) -> Path:
    """Write the base's identity beside the adapter, so that every other base is refused from then on.

    Checks first that the adapter fits the base. Returns the file, `peanut_base.json`.
    """
    plan_merge(base, adapter, force_base=True)
    return write_base_record(adapter, base)
