"""Adapters of one part of a base, trained as a model by itself: `CLIPVisionModel` of a CLIP.

transformers loads such a class from a checkpoint of the whole, so its own renamings say which tensors those are. The
whole is what is merged.
"""

from dataclasses import replace

from converters.adapters.adapter import Weighted
from converters.errors import TargetError
from converters.models.architecture import build_architecture, part_config
from converters.models.checkpoint import Checkpoint
from converters.plans.other_class.language_models import with_names
from converters.plans.targets import refuse_untrained, untrained_modules


def map_tower(base: Checkpoint, weighted: Weighted) -> tuple[Weighted, str | None]:
    """The adapter with the names that the base's files have, and a note, if it was trained on a part of the base.

    Without a note, the adapter is as it was.

    Raises:
        TargetError: transformers cannot build the part.
        ThetaError: a module of the part that should have θ has none.
    """
    adapter = weighted.adapter
    if adapter.model_class in (None, base.architecture) or adapter.target_parameters:
        return weighted, None
    config = part_config(base.config, adapter.model_class or "")
    if config is None:
        return weighted, None
    part = build_architecture(config, adapter.model_class)
    stored: dict[str, str] = {}
    for name, info in base.tensors.items():
        canonical = part.canonical(name)
        if part.shapes.get(canonical) == info.shape and not part.converted(name):
            if canonical in stored:
                raise TargetError(f"{canonical} of {part.name} could be {stored[canonical]} or {name} of {base.name}")
            stored[canonical] = name
    names = [*(f"{module}.weight" for module in adapter.modules), *adapter.saved, *adapter.embedded]
    table = {name: stored[part.canonical(name)] for name in names if part.canonical(name) in stored}
    if len(table) < len(names):
        return weighted, None
    adapted = {part.canonical(f"{module}.weight").removesuffix(".weight") for module in adapter.modules}
    spelled = {
        spelling.removesuffix(".weight"): linear
        for linear in part.linear - adapted
        if (source := stored.get(f"{linear}.weight")) is not None
        for spelling in (linear, source)
    }
    missing = untrained_modules(adapter, spelled, [*adapted, *adapter.modules])
    refuse_untrained(adapter, sorted({spelled[module] for module in missing}))
    return replace(weighted, adapter=with_names(adapter, table)), (
        f"{adapter.name} was trained on {part.name}, which is a part of this base; the whole base is merged, and the "
        "rest of it is unchanged"
    )
