"""The exact factors of all updates of one weight: `Σ delta = lora_B @ lora_A`, for every format that needs them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.adapters.parameters import owner_of
from converters.errors import ConversionError
from converters.evaluation.precision import EVALUATION_DTYPE
from converters.files.blocks import block_rows
from converters.files.reader import TensorReader
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan, Term


def refuse_full_rank(plan: Plan, modules: Mapping[str, TensorPlan], remedy: str = "merge it") -> None:
    """Raise `ConversionError` for an update that has no exact factors, or where there is none.

    Args:
        plan: the planned merge.
        modules: the updated ones, by name.
        remedy: what to do about it.
    """
    if not modules:
        raise ConversionError(f"the adapter updates no weight: it cannot be expressed as LoRA; {remedy}")
    for module, tensor in modules.items():
        for term in tensor.terms:
            described = plan.adapters[term.adapter].adapter.describe(term.module)
            reason = described.full_rank_reason if rank_of_term(plan, term) is None else None
            if reason is None and term.parameter == "bias":
                reason = "is one of a bias, beside that of the weight"
            if reason is not None:
                raise ConversionError(f"the update of {module} {reason}: it cannot be expressed as LoRA; {remedy}")


def refuse_parts(plan: Plan, form: str) -> None:
    """Raise `ConversionError` for updates of parameters, or of parts of stored tensors; `form` is what cannot be."""
    for tensor in plan.tensors:
        for term in tensor.terms:
            adapter = plan.adapters[term.adapter].adapter
            if adapter.is_parameter(term.module):
                raise ConversionError(
                    f"{adapter.path} adapts parameters of {owner_of(term.module)}, with a pair of factors for each "
                    f"expert, and cannot be written as {form}; PEFT loads it as it is, vLLM if it adapts both "
                    "gate_up_proj and down_proj (LoRA request with is_3d_lora_weight); or merge it"
                )
            if term.part is not None:
                raise ConversionError(
                    f"{term.module} is only a part of {tensor.name} of the checkpoint, and cannot be written as "
                    f"{form}; merge it, or save the base again with the names and tensors of transformers"
                )


def rank_of(plan: Plan, tensor: TensorPlan) -> int | None:
    """The rank of the exact factors of all updates of one weight together; None if one of them has none."""
    ranks = [rank_of_term(plan, term) for term in tensor.terms]
    known = [rank for rank in ranks if rank is not None]
    return sum(known) if len(known) == len(ranks) else None


def rank_of_term(plan: Plan, term: Term) -> int | None:
    """The rank of the exact factors of one update of one weight; None if it has none."""
    return plan.adapters[term.adapter].adapter.rank(term.module)


def sum_factors(plan: Plan, tensor: TensorPlan, reader: TensorReader, device: torch.device) -> tuple[Tensor, Tensor]:
    """lora_B (out, r) and lora_A (r, in) of the sum of all updates of one weight, in float64 on the CPU."""
    source = tensor.source
    if source is None:
        raise ValueError(f"{tensor.name} is not from the base")
    ups, downs = [], []
    for term in tensor.terms:
        update = plan.delta_of(term).update((source.shape[0], source.shape[1]), EVALUATION_DTYPE, device)
        found = update.factors(reader.row_blocks(source, block_rows(source.row_size)))
        ups.append(found.up.cpu())
        downs.append(found.down.cpu())
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    return (down.T, up.T) if tensor.is_transposed else (up, down)
