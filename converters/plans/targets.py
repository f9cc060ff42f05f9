"""From the module names of an adapter to the tensor names of a checkpoint, and the names of the output.

Adapters carry the names of the transformers that trained them, checkpoints those of the one that wrote them.
Where both agree, which is so for language models, names are taken as they are. Otherwise both are translated
to the names of today's transformers (`architecture.py`), which settles every pairing of old and new; a plain decoder
has the same names in all of them (`plain_decoders.py`).
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converters.adapters.adapter import Adapter
from converters.errors import OptionError, TargetError, ThetaError
from converters.models.checkpoint import Checkpoint
from converters.plans.tensor import Part


@dataclass(frozen=True)
class Target:
    """One update of one parameter of a module: read it as `base_name`, write it as `output_name`."""

    adapter: int  # which of the adapters
    module: str
    base_name: str
    output_name: str
    parameter: str = "weight"  # or its bias
    part: Part | None = None
    transposed: bool = False  # of a parameter of experts: it is (experts, in, out)


@dataclass(frozen=True)
class Targets:
    """Every name of a merge.

    Attributes:
        targets: the updates; several adapters may update the same weight.
        replaced: output name -> tensor of the adapter that replaces it; see `find_head` for which adapter.
        embedded: (adapter, base tensor saved with it, name of that tensor in the base), to be compared.
        kept: output name -> base tensor that is copied under it.
        dropped: base tensor that is left out -> why.
        config: the merged config, except for its dtype.
        notes: for the user.
    """

    targets: tuple[Target, ...]
    kept: Mapping[str, str]
    config: Mapping[str, Any]
    replaced: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    embedded: tuple[tuple[int, str, str], ...] = ()
    notes: tuple[str, ...] = ()


def find_head(adapters: Sequence[Adapter]) -> int:
    """Which adapter replaces tensors as a whole; the first if none does.

    Raises `OptionError` if several do.
    """
    found = [i for i, adapter in enumerate(adapters) if adapter.saved]
    if len(found) > 1:
        first, second = (adapters[i] for i in found[:2])
        raise OptionError(
            f"{first.path} and {second.path} both replace tensors ({next(iter(first.saved))}, "
            f"{next(iter(second.saved))}): a head can come from one adapter only"
        )
    return found[0] if found else 0


def find_direct_targets(base: Checkpoint, adapters: Sequence[Adapter]) -> Targets | None:
    """Targets whose names need no translation; None if a name differs, or if more than layers is touched."""
    linear = {
        n.removesuffix(".weight") for n, t in base.tensors.items() if n.endswith(".weight") and len(t.shape) == 2
    }
    targets = []
    for position, adapter in enumerate(adapters):
        if adapter.saved or adapter.embedded or adapter.target_parameters:
            return None  # class, labels, ties and sizes have to be checked, base weights compared, parameters found
        if adapter.targeting is not None and adapter.targeting.modules_to_save:
            return None  # whether the model has them
        pairs = {module: f"{module}.weight" for module in adapter.modules}
        if any(not adapter.describe(module).changes_weight for module in pairs):
            return None  # the biases have to be there
        inside_layers = all(re.search(r"\.\d+\.", module) for module in pairs)
        if not inside_layers or not all(name in base.tensors for name in pairs.values()):
            return None
        if any(len(base.tensors[name].shape) > 2 for name in pairs.values()):
            return None  # what a convolution does with its weight
        if untrained_modules(adapter, linear - set(pairs), pairs):
            return None
        targets += [Target(position, module, name, name) for module, name in pairs.items()]
        biases = {module: f"{module}.bias" for module in pairs if adapter.describe(module).bias is not None}
        targets += [
            Target(position, module, name, name, "bias") for module, name in biases.items() if name in base.tensors
        ]
    updated = {target.base_name for target in targets}
    return Targets(
        targets=tuple(targets),
        kept={name: name for name in base.tensors if name not in updated},
        config=base.config,
    )


def untrained_modules(adapter: Adapter, others: Iterable[str], adapted: Iterable[str]) -> list[str]:
    """Linear modules among `others` that the adapter should have θ for, by its config or layout, and has not.

    `adapted` are the adapted modules in the same naming. Under 'all-linear' only modules count that differ
    from an adapted one in their layer number alone.
    """
    targeting = adapter.targeting
    if targeting is None:
        return []
    if targeting.all_linear:
        shapes = {_without_numbers(module) for module in adapted}
        return sorted(m for m in others if _without_numbers(m) in shapes and targeting.matches(m))
    return sorted(m for m in others if targeting.matches(m))


def refuse_untrained(adapter: Adapter, missing: list[str]) -> None:
    """Raise `ThetaError` if there are modules without θ that should have it."""
    if missing:
        raise ThetaError(
            f"{adapter.path}: {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + " should have θ like the rest, but the weights contain none for it; the adapter is incomplete, or "
            "belongs to another base"
        )


def not_found(name: str, candidates: Iterable[str], where: str) -> TargetError:
    """The error for an adapter weight without a tensor, with the nearest names."""
    near = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    hint = f"; nearest there: {', '.join(near)}" if near else ""
    return TargetError(
        f"the adapter's {name} has no matching tensor in {where}{hint}; is this the base it was trained on?"
    )


def _without_numbers(module: str) -> str:
    return re.sub(r"\d+", "#", module)
