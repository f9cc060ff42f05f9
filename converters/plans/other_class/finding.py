"""Finding what adapters update, under the names of the base's files."""

from collections.abc import Sequence
from dataclasses import replace

from converters.adapters.adapter import Weighted
from converters.models.checkpoint import Checkpoint
from converters.plans.other_class.language_models import map_language_model
from converters.plans.other_class.towers import map_tower
from converters.plans.renaming import find_renamed_targets
from converters.plans.targets import Targets, find_direct_targets


def find_targets(
    base: Checkpoint, adapters: Sequence[Weighted], labels: list[str] | None
) -> tuple[Sequence[Weighted], Targets]:
    """What is updated and replaced; the adapters have the base's names where they were trained on another class.

    Raises what `find_renamed_targets` raises.
    """
    direct = find_direct_targets(base, [weighted.adapter for weighted in adapters]) if labels is None else None
    if direct is not None:
        return adapters, direct
    notes: list[str] = []
    for map_names in (map_tower, map_language_model):
        mapped = [map_names(base, weighted) for weighted in adapters]
        adapters = [weighted for weighted, _ in mapped]
        notes += [note for _, note in mapped if note is not None]
    found = find_renamed_targets(base, [weighted.adapter for weighted in adapters], labels)
    return adapters, replace(found, notes=(*notes, *found.notes))
