"""Updates of tensors that are tied to each other: which move together, and which training separated.

In HF PEFT an adapted module stops sharing its weight: its partner keeps the base's. Trained tokens are the exception
(`peft/utils/other.py`, `set_additional_trainable_modules`): what is tied to the embedding moves along, unless it has
trained tokens of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from converters.adapters.adapter import Adapter
from converters.errors import OptionError
from converters.models.architecture import Architecture
from converters.plans.targets import Target


def tie_targets(
    targets: Sequence[Target],
    adapters: Sequence[Adapter],
    arch: Architecture,
    by_canonical: Mapping[str, str],
    replaced: set[str],
) -> tuple[list[Target], set[str]]:
    """The updates, with those of tied tensors completed, and the aliases that stay tied to an updated source.

    Args:
        targets: the updates that the adapters have θ for.
        adapters: the adapters.
        arch: the class of the merged model.
        by_canonical: name in memory -> tensor of the base.
        replaced: names in memory of tensors that are replaced whole.
    """
    found = {alias: _shared(targets, adapters, arch, alias) for alias in arch.tied}
    touched, tied = set(), set()
    for alias, source in arch.tied.items():
        own, beside = _of(targets, arch, alias), _of(targets, arch, source)
        if own or beside or {alias, source} & replaced:
            touched.add(alias)
        if beside and found[alias] == beside and not own and not {alias, source} & replaced:
            tied.add(alias)
    if touched != tied:
        tied = set()  # `tie_word_embeddings` is one setting for all
    result = list(targets)
    for alias, shared in found.items():
        base_name = by_canonical.get(alias)
        if alias not in tied or base_name is not None:  # else it has no tensor of its own
            base_name = base_name or by_canonical[arch.tied[alias]]
            result += [replace(target, base_name=base_name, output_name=alias) for target in shared]
    return result, tied


def _of(targets: Sequence[Target], arch: Architecture, name: str) -> list[Target]:
    """The updates of one tensor, by its name in memory."""
    return [target for target in targets if arch.canonical(target.output_name) == name]


def _shared(targets: Sequence[Target], adapters: Sequence[Adapter], arch: Architecture, alias: str) -> list[Target]:
    """The updates of its source that an alias shares.

    Raises `OptionError` where an adapter trains tokens of the source, and changes the alias in another way.
    """
    own, shared = _of(targets, arch, alias), []
    for target in _of(targets, arch, arch.tied[alias]):
        adapter = adapters[target.adapter]
        if not adapter.describe(target.module).keeps_ties:
            continue
        beside = [one for one in own if one.adapter == target.adapter]
        if any(not adapter.describe(one.module).keeps_ties for one in beside):
            raise OptionError(
                f"{adapter.path} trains tokens of {target.module} and adapts {beside[0].module}, which is tied to it "
                "in this base; PEFT does not define what the two do together; give an untied base, if it was trained "
                "on one"
            )
        if not beside:
            shared.append(target)
    return shared
