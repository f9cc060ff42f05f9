"""What HF PEFT's adapter folders have in common: module names, modules_to_save, and facts about the base."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor

from converters.errors import ConversionError
from converters.models.architecture import AUTO_CLASSES, Architecture
from converters.models.one_name import memory_name, name_each
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan

PREFIX = "base_model.model."


FORM = "an adapter for HF PEFT"

T = TypeVar("T")


def by_module(arch: Architecture, tensors: Iterable[tuple[str, T]], experts: bool = False) -> dict[str, T]:
    """Module, as the installed transformers names it -> what belongs to it, by (weight in the checkpoint, it).

    Those names are what PEFT looks for. With `experts`, one of them has its name in the checkpoint.

    Raises `ConversionError` for a weight without a name of its own there.
    """

    def module(name: str) -> str:
        found = arch.conversion(name) if experts and name not in arch.shapes and arch.converted(name) else None
        is_expert = found is not None and found.expert is not None
        return (name if is_expert else memory_name(arch, name, FORM)).removesuffix(".weight")

    return name_each(((module(name), name, thing) for name, thing in tensors), FORM)


def saved_tensors(plan: Plan, arch: Architecture) -> dict[str, Tensor]:
    """Name in memory -> tensor, for the tensors that the adapter replaces."""
    return {name: plan.head.saved_tensor(str(planned.saved)) for name, planned in by_saved(plan, arch).items()}


def by_saved(plan: Plan, arch: Architecture) -> dict[str, TensorPlan]:
    """Name in memory -> the planned tensor, for those that the adapter replaces.

    Raises `ConversionError` for one without a name of its own there.
    """
    replaced = [tensor for tensor in plan.tensors if tensor.saved is not None]
    return name_each(((memory_name(arch, one.name, FORM), one.name, one) for one in replaced), FORM)


def saved_modules(arch: Architecture, saved: dict[str, Tensor]) -> list[str]:
    """The modules_to_save. Raises `ConversionError` if only a part of one was trained."""
    modules = set()
    for name in saved:
        top = name.split(".")[0]
        modules.add(name.rpartition(".")[0] if top == arch.prefix else top)
    for module in modules:
        if missing := sorted(n for n in arch.shapes if n.startswith(f"{module}.") and n not in saved):
            raise ConversionError(
                f"PEFT saves modules whole, but the adapter has only a part of {module} ({missing[0]} is not in it); "
                "merge it"
            )
    return sorted(modules)


def base_facts(plan: Plan, arch: Architecture) -> dict[str, Any]:
    """The part of an adapter_config.json about the base (`peft/config.py`, `PeftConfig`)."""
    task_type = plan.head.task_type
    known = task_type in AUTO_CLASSES and task_type != "IMAGE_CLS"
    return {
        "task_type": task_type if known else None,
        "auto_mapping": None if known else {"base_model_class": arch.name, "parent_library": "transformers"},
        "base_model_name_or_path": plan.base.repo_id or plan.base.name,
        "revision": plan.base.revision,
        "inference_mode": True,
    }
