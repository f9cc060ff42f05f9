"""Modules that an adapter replaces whole: which ones PEFT replaces, and whether the adapter has all of them.

PEFT replaces every module whose name ends with an entry of modules_to_save, and saves all tensors of each.
"""

from collections.abc import Mapping

from converters.adapters.adapter import Adapter
from converters.errors import TargetError, ThetaError
from converters.models.architecture import Architecture
from converters.plans.base_names import BaseNames


def check_saved(adapter: Adapter, arch: Architecture, names: BaseNames) -> None:
    """Check that an adapter has every tensor of the modules that its config replaces whole.

    Raises:
        ThetaError: a tensor is missing. Without it, the module would be merged in part.
        TargetError: one of the modules contains another one of them.
    """
    targeting = adapter.targeting
    if targeting is None or not targeting.modules_to_save:
        return
    spelled = _spelled(adapter, arch, names)
    saved = {arch.canonical(name) for name in adapter.saved}
    holders = targeting.holders(map(_module, spelled))
    for holder in sorted(holders):
        outer = [other for other in holders if holder.startswith(f"{other}.")]
        if outer:
            raise TargetError(
                f"{adapter.path}: modules_to_save {list(targeting.modules_to_save)} replaces {outer[0]} and, inside "
                f"of it, {holder}; PEFT does not load such an adapter again, so what it means is not defined; train "
                "with one of the two"
            )
    unsaved = sorted(spelling for spelling, name in spelled.items() if name not in saved)
    missing = [spelling for spelling in unsaved if targeting.saves(_module(spelling))]
    if missing:
        raise ThetaError(
            f"{adapter.path}: {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + f" should be among the weights, for modules_to_save is {list(targeting.modules_to_save)}; the adapter "
            "is incomplete, or belongs to another base"
        )


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _spelled(adapter: Adapter, arch: Architecture, names: BaseNames) -> Mapping[str, str]:
    """Every tensor of the class, as the adapter spells it -> its name in memory.

    An adapter has today's names, or those of the transformers that trained it, which are those of checkpoints.
    """
    own = [*adapter.saved, *(f"{module}.weight" for module in adapter.modules if not adapter.is_parameter(module))]
    if all(name in arch.shapes for name in own):
        return {name: name for name in arch.shapes}
    stored = {name: names.source(name) for name in arch.shapes}
    return {names.output(source) if source is not None else name: name for name, source in stored.items()}
