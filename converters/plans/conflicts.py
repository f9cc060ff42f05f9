"""What adapters and their targets must not be together: refused before anything is planned."""

from collections.abc import Sequence

from converters.adapters.adapter import Adapter, Weighted
from converters.errors import LayoutError, OptionError, TargetError
from converters.models.checkpoint import Checkpoint
from converters.plans.targets import Target, Targets
from converters.plans.tensor import Part


def refuse_weights(adapters: Sequence[Weighted]) -> None:
    """Raise `OptionError` for the weight of an adapter without a delta: what replaces tensors is not multiplied."""
    for weighted in adapters:
        if not weighted.adapter.modules and weighted.weight != 1:
            raise OptionError(
                f"{weighted.adapter.path} only replaces tensors, and its weight in the sum is {weighted.weight:g}, "
                "which would have no effect; leave the weight out"
            )


def refuse_conflicts(adapters: Sequence[Adapter], found: Targets) -> None:
    """Refuse a tensor that is replaced and updated as well, or that one adapter updates under two names.

    Raises `OptionError` for the first, `TargetError` for the second.
    """
    _refuse_twins(adapters, found)
    updated = {target.output_name for target in found.targets}
    if both := sorted(updated & set(found.replaced)):
        if len(adapters) == 1:
            raise OptionError(
                f"{both[0]} is saved whole by the adapter, and updated by it as well (as with bias and lora_bias of "
                "a LoraConfig together); merge it with PEFT's merge_and_unload"
            )
        raise OptionError(
            f"{both[0]} is replaced by one adapter and updated by another; such a sum is not defined: "
            "merge one of them"
        )


def _refuse_twins(adapters: Sequence[Adapter], found: Targets) -> None:
    """Refuse an adapter with two modules for one weight, under two names; which one was trained, nothing says."""
    seen: dict[tuple[int, str, str, Part | None, bool], str] = {}
    for target in found.targets:
        is_parameter = adapters[target.adapter].is_parameter(target.module)
        key = (target.adapter, target.output_name, target.parameter, target.part, is_parameter)
        if seen.setdefault(key, target.module) != target.module:
            raise TargetError(
                f"{adapters[target.adapter].path}: {seen[key]} and {target.module} are both {target.output_name} of "
                "the base; remove the one that was not trained"
            )


def settle_layout(base: Checkpoint, adapter: Adapter, targets: Sequence[Target]) -> None:
    """Refuse an adapter that could be in two layouts, unless the base's shapes decide.

    LoRA and the authors' LLM code share every name; lora_B is (out, r) in one and (in, r) in the other.

    Raises `LayoutError`.
    """
    if adapter.rival is None or any(len(set(base.tensors[target.base_name].shape)) > 1 for target in targets):
        return
    raise LayoutError(
        f"{adapter.path}: every adapted weight is square, so nothing shows whether this is a plain LoRA or from the "
        f"PEANuT authors' LLM code, which saves under the same names; say layout='{adapter.layout}' or "
        f"layout='{adapter.rival}' ({adapter.evidence}; no field of a config that only HF PEFT writes)"
    )
