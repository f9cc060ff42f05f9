"""Changes of biases in a LoRA adapter: the bias of lora_B, which HF PEFT adds with `lora_bias=True`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.errors import ConversionError, VerificationError
from converters.evaluation.recompute import recompute
from converters.files.reader import TensorReader
from converters.models.architecture import Architecture
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan


def find_biases(plan: Plan, arch: Architecture, modules: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Module -> its bias, where an adapter updates or replaces it, for the modules whose weights are updated.

    Raises `ConversionError` for an updated bias of another module: LoRA would have nothing to hang it on.
    """
    found = {}
    for tensor in plan.tensors:
        name = arch.canonical(tensor.name)
        module = name.removesuffix(".bias")
        is_replaced = tensor.saved is not None and tensor.name in plan.base.tensors
        if module == name or not (is_replaced or tensor.terms):
            continue
        if module in modules:
            found[module] = tensor
        elif tensor.terms:
            raise ConversionError(
                f"the adapter changes the bias of {module}, and not its weight: it cannot be expressed as LoRA; "
                "merge it"
            )
    return found


def bias_delta(plan: Plan, tensor: TensorPlan, reader: TensorReader) -> Tensor:
    """What is added to a bias (out,), in float64."""
    base = reader.whole(plan.base.tensors[tensor.name] if tensor.source is None else tensor.source).double()
    if tensor.saved is not None:
        return plan.head.saved_tensor(tensor.saved).double() - base
    return torch.stack([delta.delta(base[:, None])[:, 0] for delta in plan.deltas_of(tensor)]).sum(dim=0)


def check_bias(found: Tensor, plan: Plan, tensor: TensorPlan, dtype: torch.dtype, reader: TensorReader) -> int:
    """Recompute a change of a bias in float64, and compare it with `found` (out,), which was rounded to `dtype`.

    Returns the number of numbers. Raises `VerificationError` if one is not the float64 value, rounded once.
    """
    if tensor.saved is not None:
        wanted = bias_delta(plan, tensor, reader)
        spread = wanted.abs()
    else:
        rows, column = torch.arange(tensor.shape[0]), torch.zeros(1, dtype=torch.long)
        _, delta, magnitude = recompute(tensor, rows, column, plan.deltas_of(tensor), reader)
        wanted, spread = delta[:, 0], magnitude[:, 0]
    info = torch.finfo(dtype)
    allowed = info.eps * (wanted.abs() + info.smallest_normal) + torch.finfo(wanted.dtype).eps * 256 * spread
    if bool(((found - wanted).abs() > allowed).any()):
        raise VerificationError(f"{tensor.name}: recomputed changes of the bias are wrong")
    return found.numel()
