"""What one task changes of its base: updated weights and heads, evaluated, checked, and named as in a trace."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.evaluation.accounting import check_accounts
from converters.evaluation.blocks import tensor_blocks
from converters.evaluation.verify import Verification, verify_numbers
from converters.evaluation.worker import Worker
from converters.models.architecture import Architecture
from converters.models.one_name import memory_name, name_each
from converters.plans.merge import Plan
from converters.plans.tensor import Action, TensorPlan


@dataclass(frozen=True, eq=False)
class TaskWeights:
    """A task's own tensors.

    Attributes:
        plan: the merge they are of.
        updated: name in transformers' memory -> the tensor of the plan, of weights that f updates.
        tensors: the same name -> float32 numbers; also of what is replaced or added whole.
        verification: of the updated ones, against float64.
    """

    plan: Plan
    updated: Mapping[str, TensorPlan]
    tensors: Mapping[str, Tensor]
    verification: Verification

    @property
    def whole(self) -> dict[str, Tensor]:
        """Those that do not come from f: heads."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.updated}


def evaluate_task(plan: Plan, arch: Architecture, device: torch.device) -> TaskWeights:
    """Evaluate everything a plan changes, and recompute a sample of it.

    Args:
        plan: a planned merge in float32.
        arch: the class it is of.
        device: where f is evaluated.

    Raises:
        NonFiniteError: a merged weight is not finite.
        VerificationError: a recomputed number is another.
    """
    worker = Worker(device, threading.Event())
    updated, tensors, checks = {}, {}, []
    try:
        for name, planned in own_tensors(plan, arch).items():
            tensors[name] = _numbers(plan, planned, worker)
            if planned.terms:
                updated[name] = planned
                checks.append(verify_numbers(tensors[name], planned, plan.deltas_of(planned), worker.reader))
    finally:
        worker.close()
    return TaskWeights(plan, updated, tensors, Verification.of(len(updated), checks))


def check_task_accounts(task: TaskWeights, arch: Architecture) -> None:
    """Raise `VerificationError` unless a written task has all that its adapters have; see `accounting.py`."""
    own = own_tensors(task.plan, arch)
    tied = {name: other for pair in arch.tied.items() for name, other in (pair, pair[::-1])}
    found = [own[name if name in own else tied[name]].name for name in task.tensors]
    check_accounts(task.plan, own.values(), found, "the ONNX graph")


def own_tensors(plan: Plan, arch: Architecture) -> dict[str, TensorPlan]:
    """Name in memory -> what a plan changes of its base.

    Raises `ConversionError` for a tensor without a name of its own in memory.
    """
    changed = [one for one in plan.tensors if one.terms or one.saved is not None or one.action is Action.ADDED]
    return name_each(((memory_name(arch, one.name, "ONNX"), one.name, one) for one in changed), "the ONNX graph")


def _numbers(plan: Plan, planned: TensorPlan, worker: Worker) -> Tensor:
    if planned.is_copy and planned.source is not None:
        return worker.reader.whole(planned.source).float()
    numbers, done = torch.empty(planned.shape).view(-1), 0
    for block in tensor_blocks(plan, planned, worker):
        numbers[done : done + block.numel()] = block.reshape(-1)
        done += block.numel()
    return numbers.view(planned.shape)
