"""Planning a LoRA adapter: its config, the rank of every module, and what cannot be expressed.

The folder is in HF PEFT's layout (`peft/tuners/lora/config.py`), which vLLM reads as well
(`vllm/lora/peft_helper.py`). The scale is part of the factors: `lora_alpha = r`. The ranks of summed adapters add.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.adapters.targeting import PREFIX
from converters.errors import ConversionError
from converters.evaluation.factors import rank_of, refuse_full_rank
from converters.files.header import FLOAT_DTYPES, INTEGER_DTYPES, TensorSpec
from converters.files.staging import check_output
from converters.models.architecture import Architecture
from converters.outputs.lora.biases import find_biases
from converters.outputs.lora.experts import ExpertGroup, find_groups
from converters.outputs.lora.options import LoraOptions
from converters.outputs.lora.stacks import find_stacks, matrices
from converters.outputs.lora.vllm_experts import expert_refusals, takes_joined
from converters.outputs.lora.vllm_limits import VLLM_RANKS, vllm_refusals
from converters.outputs.peft_names import (
    base_facts,
    by_module,
    by_saved,
    merged_architecture,
    refuse_changed_base,
    saved_modules,
    saved_tensors,
)
from converters.plans.merge import DTYPE_OPTIONS, Plan
from converters.plans.tensor import TensorPlan

_PEFT = "0.19.1"  # the first version that has in and out of experts in this order
_PEFT_EXPERTS = (
    "the experts of a layer are in one pair of factors, as HF PEFT has them with transformers 5; for vLLM, write "
    "it with runtime='vllm'"
)


@dataclass(frozen=True, eq=False)
class LoraAdapterPlan:
    """A LoRA adapter that can be written.

    Attributes:
        plan: the planned merge it was made from.
        output: folder to write.
        dtype: of the factors, as safetensors spells it.
        config: the adapter_config.json.
        modules: module name, as PEFT has it -> the weight it updates.
        ranks: module name -> rank of its factors.
        saved: tensor of modules_to_save -> the tensor.
        saved_names: the same -> tensor of the plan.
        biases: module name -> the bias that changes as well.
        groups: experts whose factors are joined; those of other modules are apart.
        options: what it may be.
        vllm_refuses: why vLLM would not load it.
    """

    plan: Plan
    output: Path
    dtype: str
    config: Mapping[str, Any]
    modules: Mapping[str, TensorPlan]
    ranks: Mapping[str, int]
    saved: Mapping[str, Tensor]
    saved_names: Mapping[str, str]
    biases: Mapping[str, TensorPlan] = field(default_factory=dict)
    groups: tuple[ExpertGroup, ...] = ()
    options: LoraOptions = field(default_factory=LoraOptions)
    vllm_refuses: tuple[str, ...] = ()

    @property
    def r(self) -> int:
        """The largest rank."""
        return max(_written_ranks(self.ranks, self.groups).values())

    @property
    def apart(self) -> dict[str, TensorPlan]:
        """The modules that have factors of their own."""
        joined = {module for group in self.groups for module in group.places}
        return {module: tensor for module, tensor in self.modules.items() if module not in joined}

    @property
    def max_lora_rank(self) -> int | None:
        """The smallest --max-lora-rank with which vLLM serves it; None if vLLM serves no such rank."""
        return next((rank for rank in VLLM_RANKS if rank >= self.r), None)

    @property
    def nbytes(self) -> int:
        """Size of the weights file's tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights that have to be read."""
        return sum(tensor.source.nbytes for tensor in self.modules.values() if tensor.source is not None)

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of the weights file."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, tensor in self.apart.items():
            r, (out, width) = self.ranks[module], module_shape(tensor)
            shapes |= zip(factor_names(module), ((out, r), (r, width)), strict=True)
            if self.biases:
                shapes[bias_name(module)] = (out,)
        for group in self.groups:
            shapes |= zip(factor_names(group.key), group.factor_shapes, strict=True)
        itemsize = FLOAT_DTYPES[self.dtype].itemsize
        specs = [TensorSpec(name, self.dtype, shape, math.prod(shape) * itemsize) for name, shape in shapes.items()]
        for name, saved in self.saved.items():
            dtype = INTEGER_DTYPES.get(saved.dtype, self.dtype)
            size = saved.numel() * (itemsize if saved.is_floating_point() else saved.itemsize)
            specs.append(TensorSpec(PREFIX + name, dtype, tuple(saved.shape), size))
        return specs


def plan_lora_adapter(
    plan: Plan,
    output: str | Path,
    overwrite: bool = False,
    options: LoraOptions | None = None,
    *,
    remedy: str = "merge it",
    otherwise: str = "; without runtime= it is written for PEFT",
) -> LoraAdapterPlan:
    """Plan to write the sum of the plan's adapters as one LoRA adapter, its factors in the plan's dtype, or float32.

    Args:
        plan: a planned merge, whose adapters were checked against their base and whose names are settled.
        output: folder to write.
        overwrite: replace an earlier output of this toolkit.
        options: what it may be; by default exact, and what PEFT loads.
        remedy: what the error says to do where exact factors are missing.
        otherwise: the same, where the runtime would not load it.

    Raises:
        ConversionError: see `as_lora`; or the runtime of the options would not load it.
        OutputExistsError: the folder exists, or contains an input.
    """
    options = options or LoraOptions()
    converted = as_lora(plan, Path(output), options, remedy=remedy)
    if options.runtime is not None and converted.vllm_refuses:
        raise ConversionError(f"vLLM would refuse this LoRA adapter: {'; '.join(converted.vllm_refuses)}{otherwise}")
    inputs = [plan.base.folder, *(weighted.adapter.path for weighted in plan.adapters)]
    check_output(Path(output), overwrite, inputs)
    return converted


def as_lora(
    plan: Plan, output: Path, options: LoraOptions | None = None, *, remedy: str = "merge it"
) -> LoraAdapterPlan:
    """A planned merge as a LoRA adapter that HF PEFT loads. Does not look at the output.

    Raises `ConversionError` if the adapter cannot be expressed as LoRA; the message says why, and ends in `remedy`
    where exact factors are missing.
    """
    options = options or LoraOptions()
    refuse_changed_base(plan, stacks_layers=True)
    arch = merged_architecture(plan)
    for_vllm = options.runtime == "vllm"
    stacks = find_stacks(plan, arch)
    modules = _modules(plan, arch, stacks)
    if options.rank is None:
        refuse_full_rank(plan, modules, remedy)
    _refuse_other_layers(arch, modules, stacks)
    ranks = {module: _rank(plan, tensor, options.rank) for module, tensor in modules.items()}
    biases = find_biases(plan, arch, modules)
    inside = {f"{module}.bias" for module in biases}
    saved = {name: tensor for name, tensor in saved_tensors(plan, arch).items() if name not in inside}
    whole = saved_modules(arch, saved)
    groups = find_groups(plan, arch, modules, stacks, ranks)
    if groups and (biases or any(tensor.is_transposed for tensor in modules.values())):
        other = "biases" if biases else "layers that are stored as (in, out)"
        raise ConversionError(f"the adapter changes experts and {other}: it cannot be expressed as LoRA; merge it")
    joined = () if for_vllm and not takes_joined(arch) else groups
    written = _written_ranks(ranks, joined)
    config = _config(plan, arch, written, joined, whole, bool(biases))
    dtype = DTYPE_OPTIONS[plan.options["dtype"]] or "F32"
    refused = vllm_refusals(max(written.values()), whole, saved, bool(biases), arch.name)
    if "layer_replication" in config:
        refused = (*refused, "it is of stacked layers (layer_replication), which vLLM does not build; merge it")
    if groups:
        is_same = for_vllm or takes_joined(arch)  # as vLLM takes it
        refused = (*refused, *(expert_refusals(arch, groups, ranks) if is_same else [_PEFT_EXPERTS]))
    names = {name: planned.name for name, planned in by_saved(plan, arch).items()}
    return LoraAdapterPlan(
        plan, output, dtype, config, modules, ranks, saved, names, biases, joined, options, refused
    )


def factor_names(module: str) -> tuple[str, str]:
    """The names of lora_B and lora_A."""
    return f"{PREFIX}{module}.lora_B.weight", f"{PREFIX}{module}.lora_A.weight"


def bias_name(module: str) -> str:
    """The name of the bias of lora_B."""
    return f"{PREFIX}{module}.lora_B.bias"


def module_shape(tensor: TensorPlan) -> tuple[int, int]:
    """(out, in) of the module of a weight."""
    rows, columns = tensor.shape
    return (columns, rows) if tensor.is_transposed else (rows, columns)


def _modules(plan: Plan, arch: Architecture, stacks: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Module, or matrix of one expert -> the weight that is updated."""
    inside = {tensor.name for tensor in stacks.values()}
    others = ((tensor.name, tensor) for tensor in plan.tensors if tensor.terms and tensor.name not in inside)
    found = by_module(arch, others, experts=True)
    modules = {module: tensor for module, tensor in found.items() if not tensor.name.endswith(".bias")}
    return modules | {own.name: own for tensor in stacks.values() for _, own in matrices(tensor)}


def _refuse_other_layers(
    arch: Architecture, modules: Mapping[str, TensorPlan], stacks: Mapping[str, TensorPlan]
) -> None:
    """Raise `ConversionError` unless there are linear layers and parameters, and nothing else."""
    inside = {own.name for tensor in stacks.values() for _, own in matrices(tensor)}
    if not modules:
        raise ConversionError("the adapter updates no weight: it cannot be expressed as LoRA; merge it")
    for module, tensor in modules.items():
        known = module in arch.linear or tensor.is_transposed or module in inside
        if not known and not arch.is_expert(tensor.name):
            raise ConversionError(
                f"{module} is not a linear layer of {arch.name}: its update cannot be written as LoRA here; merge it"
            )


def _rank(plan: Plan, tensor: TensorPlan, most: int | None) -> int:
    """The rank of a module's factors, at most `most`: the exact one, else as many as there are rows or columns."""
    exact = rank_of(plan, tensor)
    if most is None or (exact is not None and exact <= most):
        return exact or 0
    return min(most, *tensor.shape)


def _config(
    plan: Plan,
    arch: Architecture,
    ranks: Mapping[str, int],
    joined: Sequence[ExpertGroup],
    whole: list[str],
    has_biases: bool,
) -> dict[str, Any]:
    """The adapter_config.json (`peft/tuners/lora/config.py`, `LoraConfig`)."""
    transposed = any(tensor.is_transposed for tensor in plan.tensors if not tensor.is_stack)
    return {
        **base_facts(plan, arch, whole),
        "peft_type": "LORA",
        **_ranks(ranks),
        "target_modules": sorted(ranks.keys() - {group.parameter for group in joined}),
        **({"target_parameters": [group.parameter for group in joined], "peft_version": _PEFT} if joined else {}),
        "modules_to_save": whole or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        **({"lora_bias": True} if has_biases else {}),
        **{key: value for key, value in plan.base.changes.items() if key == "layer_replication"},
    }


def _written_ranks(ranks: Mapping[str, int], joined: Sequence[ExpertGroup]) -> dict[str, int]:
    """Module, or parameter of experts whose factors are joined -> rank."""
    inside = {module for group in joined for module in group.places}
    apart = {module: rank for module, rank in ranks.items() if module not in inside}
    return apart | {group.parameter: group.rank for group in joined}


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Ranks, and alphas that make every scale 1, also for a reader that knows no patterns of alpha."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in sorted(ranks.items()) if rank != common}
    return {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}
