"""What follows from the targets: ties that training separated, and the config's sizes and labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from converters.adapters.adapter import Adapter
from converters.errors import BaseMismatchError, OptionError
from converters.models import config as model_config
from converters.models.architecture import Architecture
from converters.models.checkpoint import Checkpoint
from converters.plans.base_names import BaseNames
from converters.plans.targets import Target, find_head
from converters.plans.ties import tie_targets


@dataclass
class PendingTargets:
    """Targets under construction; see `Targets`."""

    config: Mapping[str, Any]
    targets: list[Target] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    embedded: list[tuple[int, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settle_ties(draft: PendingTargets, adapters: Sequence[Adapter], arch: Architecture, names: BaseNames) -> None:
    """Untie what training separated: each alias of a touched tie gets a tensor of its own.

    In an unmerged PEFT model a saved or adapted module stops sharing; its partners keep the base's weight, unless
    the method keeps ties.
    """
    adapter = adapters[find_head(adapters)]
    replaced = {arch.canonical(output) for output in draft.replaced}
    draft.targets, tied = tie_targets(draft.targets, adapters, arch, names.by_canonical, replaced)
    for output in {target.output_name for target in draft.targets} & draft.kept.keys():
        del draft.kept[output]
    written: dict[str, str | None] = {arch.canonical(t.output_name): None for t in draft.targets}
    written |= {arch.canonical(output): saved for output, saved in draft.replaced.items()}
    touched = [a for a, source in arch.tied.items() if a not in tied and (a in written or source in written)]
    if not touched:
        return
    if all(_same_saved(adapter, written, alias, arch.tied[alias]) for alias in touched):
        for alias in touched:
            for output in [o for o in draft.replaced if arch.canonical(o) == alias]:
                del draft.replaced[output]
        return
    draft.config = model_config.untied(draft.config)
    draft.notes.append("the output head is no longer tied to the input embedding: training changed one of them")
    for alias, source in arch.tied.items():
        if alias not in written and alias not in names.by_canonical and source in names.by_canonical:
            draft.kept[alias] = names.by_canonical[source]


def _same_saved(adapter: Adapter, written: Mapping[str, str | None], alias: str, source: str) -> bool:
    first, second = written.get(alias), written.get(source)
    if first is None or second is None:
        return False
    return torch.equal(adapter.saved_tensor(first), adapter.saved_tensor(second))


def settle_sizes(
    draft: PendingTargets, base: Checkpoint, adapter: Adapter, arch: Architecture, labels: list[str] | None
) -> None:
    """Adapt labels and vocabulary of the config to the size of what the adapter replaces.

    Raises `BaseMismatchError` for another size than those, and `OptionError` for labels that do not fit.
    """
    is_head = False
    for output, saved in draft.replaced.items():
        wanted, found = arch.shapes[arch.canonical(output)], adapter.store.shapes[adapter.saved[saved]]
        is_output = "Classification" in arch.name and bool(wanted) and wanted[0] == arch.num_labels
        is_vocabulary = bool(wanted) and wanted[0] == arch.vocab_size
        if found == wanted and not is_output:
            continue
        if is_vocabulary and found and found[1:] == wanted[1:]:
            draft.config = model_config.with_vocab_size(draft.config, wanted[0], found[0])
            draft.notes.append(f"vocabulary: {wanted[0]} becomes {found[0]}")
        elif is_output and found and found[1:] == wanted[1:]:
            if not is_head:
                _settle_labels(draft, base, adapter, labels, found[0])
            is_head = True
        else:
            raise BaseMismatchError(
                f"{saved} has shape {found} in the adapter, {arch.name} with this base's config needs {wanted}; "
                "this is another base, or another model size"
            )
    if labels is not None and not is_head:
        raise OptionError("labels were given, but the adapter has no classification head")


def _settle_labels(
    draft: PendingTargets, base: Checkpoint, adapter: Adapter, labels: list[str] | None, size: int
) -> None:
    """Labels that were given take precedence, then those recorded with the adapter, then the base's if they fit."""
    found, origin = labels, "given"
    if found is None and adapter.labels is not None:
        found, origin = list(adapter.labels), f"recorded with {adapter.path}"
    if found is not None and len(found) != size:
        remedy = "" if labels is not None else "; pass labels="
        raise OptionError(f"{len(found)} labels were {origin}, the adapter's head has {size} outputs{remedy}")
    if found is None:
        found = model_config.labels_of(base.config)
        if found is not None and len(found) == size:
            shown = ", ".join(found[:5]) + (", ..." if size > 5 else "")
            draft.notes.append(f"labels are the base's ({shown}): pass labels= if the head was trained on others")
        else:
            found = [f"LABEL_{i}" for i in range(size)]
            draft.notes.append(f"the adapter stores no labels: they are LABEL_0 to LABEL_{size - 1}; pass labels=")
    draft.config = model_config.with_labels(draft.config, found)
