"""What HF PEFT's adapter folders have in common: module names, modules_to_save, and facts about the base."""

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from torch import Tensor

from converters.adapters.targeting import DEFAULT_HEADS, PREFIX, Targeting
from converters.errors import ConversionError
from converters.models.architecture import AUTO_CLASSES, Architecture
from converters.models.one_name import memory_name, name_each
from converters.models.stored_names import architecture_of
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan
from converters.plans.trained_base.trained import describe_changes

FORM = "an adapter for HF PEFT"

T = TypeVar("T")


def merged_architecture(plan: Plan) -> Architecture:
    """The class of the merged model. Raises `TargetError` if transformers cannot build it."""
    return architecture_of(plan.base, plan.config, {t.name: t.shape for t in plan.tensors if t.source is None})


def refuse_changed_base(plan: Plan, stacks_layers: bool = False) -> None:
    """Raise `ConversionError` if the training changed its base before it began in a way that the output cannot state.

    `stacks_layers`: the output can state `layer_replication`.
    """
    if plan.base.changes.keys() - ({"layer_replication"} if stacks_layers else set()):
        raise ConversionError(
            f"the adapter was trained on a base whose {describe_changes(plan.base)} before the training, and what is "
            "written here is loaded on the base as it is; merge it"
        )


def by_module(arch: Architecture, tensors: Iterable[tuple[str, T]], experts: bool = False) -> dict[str, T]:
    """Module, as the installed transformers names it -> what belongs to it, by (weight in the checkpoint, it).

    Those names are what PEFT looks for. With `experts`, one of them has its name in the checkpoint.

    Raises `ConversionError` for a weight without a name of its own there.
    """

    def module(name: str) -> str:
        return (name if experts and arch.is_expert(name) else memory_name(arch, name, FORM)).removesuffix(".weight")

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


def saved_modules(arch: Architecture, saved: Collection[str]) -> list[str]:
    """The modules_to_save by which PEFT finds exactly these tensors: a head, or only a part of one.

    PEFT takes every module whose name ends with an entry, so names that end another module's are written in full.

    Raises `ConversionError` if only a part of a module's own tensors was trained.
    """
    modules = {_holder(arch, saved, name) for name in saved}
    return sorted(f"{PREFIX}{module}" if _caught(arch, [module]) - {module} else module for module in modules)


def base_facts(plan: Plan, arch: Architecture, whole: Collection[str]) -> dict[str, Any]:
    """The part of an adapter_config.json about the base (`peft/config.py`, `PeftConfig`).

    Where PEFT would add modules to `whole`, the modules_to_save, because of the task type, the class stands for it.
    """
    task_type = plan.head.task_type or ""
    caught = _caught(arch, [*whole, *DEFAULT_HEADS.get(task_type, ())])
    adds = not caught <= {name.removeprefix(PREFIX) for name in whole}
    known = task_type in AUTO_CLASSES and task_type != "IMAGE_CLS" and not adds
    return {
        "task_type": task_type if known else None,
        "auto_mapping": None if known else {"base_model_class": arch.name, "parent_library": "transformers"},
        "base_model_name_or_path": plan.base.repo_id or plan.base.name,
        "revision": plan.base.revision,
        "inference_mode": True,
    }


def _holder(arch: Architecture, saved: Collection[str], tensor: str) -> str:
    """The module that PEFT replaces for `tensor`: its head, if that was trained whole, or the next below that was."""
    parts = tensor.split(".")
    least = len(parts) - 1  # within the base model, the module that has it
    for length in range(least if parts[0] == arch.prefix else 1, least + 1):
        module = ".".join(parts[:length])
        missing = sorted(n for n in arch.shapes if n.startswith(f"{module}.") and n not in saved)
        if not missing:
            return module
    raise ConversionError(
        f"PEFT saves modules whole, but the adapter has only a part of {module} ({missing[0]} is not in it); merge it"
    )


def _caught(arch: Architecture, entries: Collection[str]) -> set[str]:
    """The modules that PEFT replaces by these modules_to_save."""
    targeting = Targeting((), modules_to_save=tuple(entries))
    return targeting.holders(name.rpartition(".")[0] for name in arch.shapes)
