"""Experts in a LoRA adapter: a module for each, as vLLM reads them, or one pair of factors for all, as HF PEFT does.

transformers 5 has the experts of a layer in one parameter (experts, out, in), and PEFT adapts it by
`target_parameters` (`peft/tuners/lora/layer.py`, `ParamWrapper`): the rows of lora_A are ordered by expert, then by
rank; the columns of lora_B by rank, then by expert. Where the parameter joins two projections, their ranks add: each
has columns of lora_B of its own, which are zero in the rows of the other one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.models.architecture import Architecture
from converters.plans.tensor import TensorPlan


@dataclass(frozen=True)
class ExpertGroup:
    """The adapted experts of one parameter.

    Attributes:
        parameter: its name in memory.
        key: module under which PEFT has its factors.
        shape: (experts, out, in).
        parts: number of projections that it joins.
        places: module of one expert, as the checkpoint has it -> (expert, part).
        ranks: rank of the factors of each part.
    """

    parameter: str
    key: str
    shape: tuple[int, int, int]
    parts: int
    places: Mapping[str, tuple[int, int]]
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Of the factors of one expert."""
        return sum(self.ranks)

    @property
    def factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of lora_B and lora_A."""
        count, out, width = self.shape
        return (out, self.rank * count), (self.rank * count, width)

    def join(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """lora_B and lora_A from those of each module."""
        count, out, width = self.shape
        rows = out // self.parts
        up = torch.zeros(out, self.rank, count, dtype=torch.float64)
        down = torch.zeros(count, self.rank, width, dtype=torch.float64)
        for module, (own_up, own_down) in factors.items():
            expert, part = self.places[module]
            start = sum(self.ranks[:part])
            stop = start + own_up.shape[1]
            up[part * rows : (part + 1) * rows, start:stop, expert] = own_up
            down[expert, start:stop] = own_down
        return up.reshape(out, -1), down.reshape(-1, width)

    def factors_of(self, module: str, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of one module in lora_B and lora_A of the group: as PEFT multiplies them, with all columns."""
        expert, part = self.places[module]
        count, out, _ = self.shape
        rows = out // self.parts
        own = up[part * rows : (part + 1) * rows, expert::count]
        return own, down[expert * self.rank : (expert + 1) * self.rank]


def is_expert(arch: Architecture, tensor: str) -> bool:
    """Whether a tensor of a checkpoint is one expert of a parameter."""
    found = arch.conversion(tensor) if tensor not in arch.shapes and arch.converted(tensor) else None
    return found is not None and found.expert is not None


def find_groups(
    arch: Architecture, modules: Mapping[str, TensorPlan], ranks: Mapping[str, int]
) -> tuple[ExpertGroup, ...]:
    """The experts among modules, by the parameter they are of.

    Raises `ConversionError` for experts that transformers stores in another way than (experts, out, in).
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    parts: dict[str, int] = {}
    for module, tensor in modules.items():
        if not is_expert(arch, tensor.name):
            continue
        conversion = arch.conversion(tensor.name)
        assert conversion is not None and conversion.expert is not None
        (parameter,) = conversion.targets
        count, out, width = arch.shapes[parameter]
        if tensor.shape != (out // conversion.parts, width) or conversion.expert >= count:
            raise ConversionError(
                f"{tensor.name} has shape {tensor.shape}, and is not one of the experts of {parameter}, "
                f"{(count, out, width)}: it cannot be written as LoRA; merge it"
            )
        found.setdefault(parameter, {})[module] = conversion.expert, conversion.part
        parts[parameter] = conversion.parts
    return tuple(
        ExpertGroup(name, key, _shape(arch, name), parts[name], found[name], _ranks(found[name], parts[name], ranks))
        for name, key in _keys(arch, found).items()
    )


def refusals(arch: Architecture, groups: Iterable[ExpertGroup], ranks: Mapping[str, int]) -> list[str]:
    """Why vLLM does not load a module for each of these experts (`vllm/lora/lora_weights.py`, `pack_moe`)."""
    groups = list(groups)
    for group in groups:
        owner = group.parameter.rpartition(".")[0]
        if len(group.places) < group.shape[0] * group.parts:
            return [f"it does not adapt every expert of {owner}, and vLLM loads all of them or none; merge it"]
        if beside := [name for name in _parameters(arch, owner) if name not in {one.parameter for one in groups}]:
            return [f"it adapts experts of {owner} but not {beside[0]}, and vLLM loads all or none; merge it"]
        for module, (_, part) in group.places.items():
            if ranks[module] != group.ranks[part]:
                return [
                    f"{module} has rank {ranks[module]}, other experts have rank {group.ranks[part]}, and vLLM loads "
                    "one rank for all; merge it"
                ]
    return []


def _parameters(arch: Architecture, owner: str) -> list[str]:
    """The parameters of one module that hold the weights of experts, in its order."""
    return [n for n, shape in arch.shapes.items() if n.rpartition(".")[0] == owner and len(shape) == 3]


def _keys(arch: Architecture, adapted: Iterable[str]) -> dict[str, str]:
    """Parameter -> module of its factors: PEFT wraps the module once for each, the last one outermost."""
    adapted = set(adapted)
    keys: dict[str, str] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in arch.shapes if name in adapted):
        own = [name for name in _parameters(arch, owner) if name in adapted]
        keys |= {name: owner + ".base_layer" * (len(own) - 1 - i) for i, name in enumerate(own)}
    return keys


def _shape(arch: Architecture, parameter: str) -> tuple[int, int, int]:
    count, out, width = arch.shapes[parameter]
    return count, out, width


def _ranks(places: Mapping[str, tuple[int, int]], parts: int, ranks: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(max((ranks[m] for m, (_, own) in places.items() if own == part), default=0) for part in range(parts))
