"""Targets by way of a model class, with transformers' own renamings, and what an adapter replaces whole.

A plain decoder needs no model code for that (`plain_decoders.py`).
"""

from collections.abc import Sequence
from dataclasses import replace

from converters.adapters.adapter import Adapter
from converters.errors import BaseMismatchError, TargetError, UnknownModelError
from converters.models.architecture import HEAD_TASKS, Architecture
from converters.models.checkpoint import Checkpoint
from converters.models.plain_decoders import class_for
from converters.models.stored_names import architecture_of, refuse_other_names, stored_architecture
from converters.plans.base_names import BaseNames
from converters.plans.parts import place_parameters, split_part
from converters.plans.saved import check_saved
from converters.plans.settling import PendingTargets, settle_sizes, settle_ties
from converters.plans.targets import Target, Targets, find_head, not_found, refuse_untrained, untrained_modules


def find_renamed_targets(base: Checkpoint, adapters: Sequence[Adapter], labels: list[str] | None) -> Targets:
    """Find every target by way of a model class.

    Args:
        base: the base.
        adapters: the adapters.
        labels: class labels for a head that comes with an adapter.

    Raises:
        TargetError: a weight of the adapter has no matching tensor (the message lists the nearest names).
        ThetaError: a module that should have θ has none.
        BaseMismatchError: sizes of adapter and base do not fit each other.
        OptionError: labels that do not fit the head; two heads.
    """
    head = adapters[find_head(adapters)]
    arch, notes = _choose_architecture(base, adapters, head)
    switched = _replaces(head) and arch.name != base.architecture
    names = BaseNames(base, arch, switched)
    draft = PendingTargets({**base.config, "architectures": [arch.name]}, notes=notes)
    if switched:
        draft.notes.append(f"architecture: {base.architecture} becomes {arch.name}, with the adapter's head")
    for position, adapter in enumerate(adapters):
        if adapter.modules:
            _place_updates(draft, base, position, adapter, arch, names)
        _place_embedded(draft, position, adapter, arch, names)
        check_saved(adapter, arch, names)
    _place_saved(draft, head, arch, names)
    _place_rest(draft, base, arch, names, switched)
    settle_ties(draft, adapters, arch, names)
    settle_sizes(draft, base, head, arch, labels)
    _check_complete(draft, base, head, switched)
    return Targets(
        tuple(draft.targets),
        draft.kept,
        draft.config,
        draft.replaced,
        draft.dropped,
        tuple(draft.embedded),
        tuple(dict.fromkeys(draft.notes)),
    )


def _choose_architecture(
    base: Checkpoint, adapters: Sequence[Adapter], head: Adapter
) -> tuple[Architecture, list[str]]:
    """The class of the merged model, with notes: the adapter's where it brings a head, else the base's."""
    brings_head = _replaces(head) and (head.model_class is not None or head.task_type in HEAD_TASKS)
    try:
        if brings_head or base.architecture is None:
            return class_for(base, head.model_class, head.task_type), []
        return class_for(base, base.architecture), []
    except UnknownModelError as unknown:
        return _take_stored_names(base, adapters, head, unknown)


def _take_stored_names(
    base: Checkpoint, adapters: Sequence[Adapter], head: Adapter, unknown: UnknownModelError
) -> tuple[Architecture, list[str]]:
    """The base's names in place of a class that is not known. Raises `UnknownModelError` where code is needed."""
    if any(adapter.target_parameters for adapter in adapters):
        raise UnknownModelError(f"{unknown}; target_parameters are not read without it") from None
    shapes = {name: head.store.shapes[key] for name, key in head.saved.items()}
    modules = [f"{module}.weight" for adapter in adapters for module in adapter.modules]
    refuse_other_names(base, modules, shapes, unknown)
    return stored_architecture(base, shapes, head.task_type, unknown)


def _replaces(adapter: Adapter) -> bool:
    """Whether it replaces modules whole, or should: PEFT's default heads may be none of the model's."""
    return bool(adapter.saved or (adapter.targeting is not None and adapter.targeting.modules_to_save))


def _place_updates(
    draft: PendingTargets, base: Checkpoint, position: int, adapter: Adapter, arch: Architecture, names: BaseNames
) -> None:
    adapted = {}
    stored = {name: info.shape for name, info in base.tensors.items()}
    if adapter.target_parameters:
        for target in place_parameters(position, adapter, arch, names.sources, stored):
            draft.targets.append(replace(target, output_name=names.output(target.base_name)))
    experts = {name for name in stored if arch.is_expert(name)}
    for module in (module for module in adapter.modules if not adapter.is_parameter(module)):
        canonical = arch.canonical(f"{module}.weight")
        _refuse_obstacles(module, canonical.removesuffix(".weight"), arch)
        own = f"{module}.weight" if f"{module}.weight" in experts else None
        source = own or names.find(canonical)
        if source is None:
            raise not_found(f"{module}.weight", [*names.canonical, *arch.shapes], f"the base ({arch.name})")
        output = canonical if canonical in arch.tied else names.output(source)
        described = adapter.describe(module)
        is_part = own is None and arch.converted(source)
        part = split_part(module, canonical, source, stored[source], arch) if is_part else None
        bias = names.find(arch.canonical(f"{module}.bias")) if described.bias is not None else None
        if described.changes_weight:
            draft.targets.append(Target(position, module, source, output, part=part))
        elif bias is None:
            raise TargetError(
                f"{module} has no bias in the base, and a {described.name} adapter changes biases; PEFT's PeftModel "
                "serves it, but no checkpoint has a place for it"
            )
        if bias is not None:
            draft.targets.append(Target(position, module, bias, names.output(bias), "bias"))
        if bias is not None and arch.converted(bias):
            raise TargetError(f"{module}: transformers fuses or splits {bias}; its update is not supported")
        adapted[canonical.removesuffix(".weight")] = source.removesuffix(".weight")
    others = {
        spelling: linear
        for linear in arch.linear - set(adapted)
        if (source := names.source(f"{linear}.weight")) is not None
        for spelling in (linear, source.removesuffix(".weight"), names.output(source).removesuffix(".weight"))
    }
    if own_experts := experts & {f"{module}.weight" for module in adapter.modules}:
        others |= {name.removesuffix(".weight"): name.removesuffix(".weight") for name in experts - own_experts}
    spelled = [*adapted, *adapted.values(), *adapter.modules]
    refuse_untrained(adapter, sorted({others[m] for m in untrained_modules(adapter, others, spelled)}))


def _refuse_obstacles(module: str, canonical: str, arch: Architecture) -> None:
    """Raise `TargetError` for a module whose weight cannot do what PEFT computes beside it."""
    if f"{canonical}.parametrizations.weight.original0" in arch.shapes or f"{canonical}.weight_g" in arch.shapes:
        raise TargetError(
            f"{module} computes its weight from other tensors (weight_norm), and PEFT adds the update beside that: "
            "the checkpoint has no weight that takes it; use the adapter in PEFT, unmerged, or train without this "
            "module in target_modules"
        )
    if canonical in arch.obstacles:
        raise TargetError(
            f"{module} {arch.obstacles[canonical]}: no weight does the same; use the adapter in PEFT, unmerged"
        )


def _place_embedded(
    draft: PendingTargets, position: int, adapter: Adapter, arch: Architecture, names: BaseNames
) -> None:
    """Find the base's own copy of the base weights that were saved together with θ."""
    for name in adapter.embedded:
        canonical = arch.canonical(name)
        source = names.find(canonical)
        if source is not None:
            draft.embedded.append((position, name, source))
        elif canonical in arch.shapes or name.endswith((".weight", ".bias")):  # else a buffer of older versions
            raise not_found(name, names.canonical, "the base, though it was saved with the adapter")


def _place_saved(draft: PendingTargets, adapter: Adapter, arch: Architecture, names: BaseNames) -> None:
    for saved in adapter.saved:
        canonical = arch.canonical(saved)
        if canonical not in arch.shapes:
            raise not_found(saved, arch.shapes, arch.name)
        source = names.by_canonical.get(canonical)
        if source is not None and arch.converted(source):
            raise TargetError(f"{saved}: transformers fuses or splits {source}; it cannot be replaced")
        output = names.output(source) if source is not None else saved
        if output in draft.replaced:
            raise TargetError(
                f"{adapter.path}: {draft.replaced[output]} and {saved} are both {output} of the base; remove the one "
                "that was not trained"
            )
        draft.replaced[output] = saved
    if adapter.targeting is not None and adapter.targeting.replaces:
        _refuse_partly_replaced(adapter, arch, names)


def _refuse_partly_replaced(adapter: Adapter, arch: Architecture, names: BaseNames) -> None:
    """Refuse an adapter that should replace all modules of its target_modules, and lacks a tensor of one."""
    saved = {arch.canonical(name) for name in adapter.saved}
    kept = {
        spelling: name
        for name in arch.shapes.keys() - saved
        if (source := names.by_canonical.get(name)) is not None
        for spelling in (name, source, names.output(source))
    }
    others = {spelling.rpartition(".")[0]: name for spelling, name in kept.items()}
    replaced = [name.rpartition(".")[0] for name in adapter.saved]
    refuse_untrained(adapter, sorted({others[m] for m in untrained_modules(adapter, others, replaced)}))


def _place_rest(
    draft: PendingTargets, base: Checkpoint, arch: Architecture, names: BaseNames, switched: bool
) -> None:
    written = {t.output_name for t in draft.targets} | set(draft.replaced)
    for name in base.tensors:
        output = names.output(name)
        if output in written:
            continue
        if switched and names.canonical[name] not in arch.shapes and not arch.converted(name):
            draft.dropped[name] = f"{arch.name} has no such tensor"
        else:
            draft.kept[output] = name


def _check_complete(draft: PendingTargets, base: Checkpoint, adapter: Adapter, switched: bool) -> None:
    """Check that the merged tensors have the shapes of the merged class, and that none of its tensors is missing."""
    replaced = {output: adapter.store.shapes[adapter.saved[saved]] for output, saved in draft.replaced.items()}
    arch = architecture_of(base, draft.config, replaced)
    shapes = {output: base.tensors[name].shape for output, name in draft.kept.items()}
    shapes |= {t.output_name: base.tensors[t.base_name].shape for t in draft.targets}
    shapes |= replaced
    present = set()
    for output, shape in shapes.items():
        canonical = arch.canonical(output)
        converted = arch.converted(output)
        present.add(canonical)
        if canonical in arch.shapes and not converted and tuple(shape) != arch.shapes[canonical]:
            raise BaseMismatchError(
                f"{output} has shape {tuple(shape)}, the merged {arch.name} needs {arch.shapes[canonical]}; base and "
                "adapter do not belong together, or part of a resized vocabulary is missing"
            )
    fused = any(arch.converted(output) for output in shapes)
    missing = [n for n in arch.shapes if n not in present and n not in arch.tied and not arch.optional(n)]
    if missing and switched and not fused:
        raise TargetError(
            f"neither base nor adapter contains {missing[0]}, which {arch.name} needs: transformers would initialise "
            "it at random; add it to modules_to_save in the training"
        )
