"""What HF PEFT's adapter folders have in common: module names, modules_to_save, and facts about the base."""

from typing import Any

from torch import Tensor

from converters.errors import ConversionError
from converters.models.architecture import AUTO_CLASSES, Architecture
from converters.plans.merge import Plan

PREFIX = "base_model.model."


def module_name(arch: Architecture, tensor: str) -> str:
    """The module of a checkpoint's weight, as the installed transformers names it: that is what PEFT looks for."""
    return arch.canonical(tensor).removesuffix(".weight")


def saved_tensors(plan: Plan, arch: Architecture) -> dict[str, Tensor]:
    """Name -> tensor, for the tensors that the adapter replaces."""
    return {arch.canonical(t.name): plan.head.saved_tensor(t.saved) for t in plan.tensors if t.saved is not None}


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
