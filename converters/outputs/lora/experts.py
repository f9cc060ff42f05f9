"""Experts in a LoRA adapter: a module for each, or one pair of factors for all, as HF PEFT has them.

transformers 5 has the experts of a layer in one parameter (experts, out, in), and PEFT adapts it by
`target_parameters` (`peft/tuners/lora/layer.py`, `ParamWrapper`): the rows of lora_A are ordered by expert, then by
rank; the columns of lora_B by rank, then by expert. Where the parameter joins two projections, their ranks add: each
has columns of lora_B of its own, which are zero in the rows of the other one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.models.architecture import Architecture
from converters.outputs.lora.stacks import columns_of, matrices
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan


@dataclass(frozen=True)
class ExpertGroup:
    """The adapted experts of one parameter.

    Attributes:
        parameter: its name in memory.
        key: module under which PEFT has its factors.
        shape: (experts, out, in), or (experts, in, out) if it is transposed. A matrix is a single expert.
        parts: number of projections that it joins.
        places: name of the matrix of one expert in the plan -> (expert, part).
        columns: the same -> those of the factors of its expert that are its own.
        is_transposed: whether its module has it as (experts, in, out).
        stack: tensor that has all experts; None if each is stored by itself.
    """

    parameter: str
    key: str
    shape: tuple[int, int, int]
    parts: int
    places: Mapping[str, tuple[int, int]]
    columns: Mapping[str, tuple[int, ...]]
    is_transposed: bool = False
    stack: str | None = None

    @property
    def rank(self) -> int:
        """Of the factors of one expert."""
        return max(column for columns in self.columns.values() for column in columns) + 1

    @property
    def factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of lora_B and lora_A."""
        count, rows, width = self.shape
        out, inside = (width, rows) if self.is_transposed else (rows, width)
        return (out, self.rank * count), (self.rank * count, inside)

    def join(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """lora_B and lora_A from the factors of each matrix."""
        count, height, width = self.shape
        rows = height // self.parts
        up = torch.zeros(count, height, self.rank, dtype=torch.float64)
        down = torch.zeros(count, self.rank, width, dtype=torch.float64)
        for name, (own_up, own_down) in factors.items():
            expert, part = self.places[name]
            columns = torch.tensor(self.columns[name])
            up[expert][part * rows : (part + 1) * rows, columns] = own_up
            down[expert][columns] = own_down
        if self.is_transposed:
            up, down = down.mT, up.mT
        return up.permute(1, 2, 0).reshape(up.shape[1], -1), down.reshape(-1, down.shape[2])

    def factors_of(self, name: str, lora_b: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of one matrix in lora_B and lora_A: as PEFT multiplies them, with all columns."""
        expert, part = self.places[name]
        count, height, _ = self.shape
        up, down = lora_b[:, expert::count], lora_a[expert * self.rank : (expert + 1) * self.rank]
        if self.is_transposed:
            up, down = down.T, up.T
        rows = height // self.parts
        return up[part * rows : (part + 1) * rows], down


def find_groups(
    plan: Plan,
    arch: Architecture,
    modules: Mapping[str, TensorPlan],
    stacks: Mapping[str, TensorPlan],
    ranks: Mapping[str, int],
) -> tuple[ExpertGroup, ...]:
    """The experts among modules, by the parameter they are of.

    Args:
        plan: the planned merge.
        arch: the class of the model.
        modules: name -> updated matrix.
        stacks: parameter -> its tensor, see `find_stacks`; its matrices are among the modules.
        ranks: name -> rank of the factors.

    Raises `ConversionError` for experts that transformers stores in another way than (experts, out, in).
    """
    places = {name: {own.name: (expert, 0) for expert, own in matrices(one)} for name, one in stacks.items()}
    parts = dict.fromkeys(stacks, 1)
    for module, tensor in modules.items():
        if arch.is_expert(tensor.name):
            parameter, count, place = _place(arch, tensor)
            places.setdefault(parameter, {})[module] = place
            parts[parameter] = count
    keys = _keys(arch, places)
    return tuple(
        ExpertGroup(
            name,
            keys[name],
            _shape(arch, name),
            parts[name],
            own := places[name],
            columns_of(plan, {module: modules[module] for module in own}, {m: p for m, (_, p) in own.items()}, ranks),
            name.rpartition(".")[0] in arch.transposed and len(arch.shapes[name]) == 3,
            stacks[name].name if name in stacks else None,
        )
        for name in keys
    )


def _place(arch: Architecture, tensor: TensorPlan) -> tuple[str, int, tuple[int, int]]:
    """The parameter that a tensor is an expert of, how many projections that joins, and (expert, part)."""
    conversion = arch.conversion(tensor.name)
    assert conversion is not None and conversion.expert is not None
    (parameter,) = conversion.targets
    count, out, width = arch.shapes[parameter]
    is_transposed = parameter.rpartition(".")[0] in arch.transposed
    if is_transposed or tensor.shape != (out // conversion.parts, width) or conversion.expert >= count:
        raise ConversionError(
            f"{tensor.name} has shape {tensor.shape}, and is not one of the experts of {parameter}, "
            f"{(count, out, width)}: it cannot be written as LoRA; merge it"
        )
    return parameter, conversion.parts, (conversion.expert, conversion.part)


def _keys(arch: Architecture, adapted: Collection[str]) -> dict[str, str]:
    """Parameter -> module of its factors: PEFT wraps the module once for each, the last one outermost."""
    keys: dict[str, str] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in arch.shapes if name in adapted):
        own = [name for name in arch.shapes if name in adapted and name.rpartition(".")[0] == owner]
        keys |= {name: owner + ".base_layer" * (len(own) - 1 - i) for i, name in enumerate(own)}
    return keys


def _shape(arch: Architecture, parameter: str) -> tuple[int, int, int]:
    *count, rows, width = arch.shapes[parameter]
    return count[0] if count else 1, rows, width
