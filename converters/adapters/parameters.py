"""LoRA on parameters instead of modules: the `target_parameters` of a LoraConfig.

HF PEFT wraps the module that has a parameter, and wraps it once more for each further one: the wrapper of the last
parameter is outermost (`peft/tuners/tuners_utils.py`, `_inject_parameters`). The weights therefore contain
`<module>.lora_A`, `<module>.base_layer.lora_A`, ..., and which parameter is which only the model class tells.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import permutations

from converters.errors import AdapterConfigError, ThetaError

_WRAPPED = re.compile(r"(?:\.base_layer)+$")

ScalingOf = Callable[[str, int], float]


def owner_of(module: str) -> str:
    """The module that has the parameter."""
    return _WRAPPED.sub("", module)


def depth_of(module: str) -> int:
    """How many wrappers are around the parameter's own."""
    return module.count(".base_layer")


def is_named(parameter: str, target_parameters: Iterable[str]) -> bool:
    """PEFT's rule for the name of a parameter: the whole name, or its end."""
    return any(parameter == name or parameter.endswith(f".{name}") for name in target_parameters)


def owners(modules: Iterable[str], target_parameters: Iterable[str]) -> dict[str, list[str]]:
    """Module that has adapted parameters -> the modules of its wrappers, outermost first."""
    parents = {name.rpartition(".")[0] for name in target_parameters}
    found: dict[str, list[str]] = {}
    for module in sorted(modules, key=depth_of):
        owner = owner_of(module)
        if "" in parents or any(owner == parent or owner.endswith(f".{parent}") for parent in parents):
            found.setdefault(owner, []).append(module)
    return found


def find_ranks(
    owner: str, rows: Mapping[str, int], target_parameters: Iterable[str], rank_of: Callable[[str], tuple[int, float]]
) -> dict[str, tuple[int, float]]:
    """(r, s) of each wrapper of one module.

    Patterns of ranks are for names of parameters, and the weights do not say which wrapper is of which parameter.
    What decides is that all have the same number of experts, or one, if they are matrices.

    Args:
        owner: the module.
        rows: wrapper, outermost first -> rows of its lora_A.
        target_parameters: of the config.
        rank_of: (r, s) of a parameter by its name.

    Raises:
        ThetaError: weights and config disagree.
        AdapterConfigError: several ranks or scales are possible.
    """
    parent_of = [name for name in target_parameters if owner.endswith(name.rpartition(".")[0])]
    leaves = sorted({name.rpartition(".")[2] for name in parent_of})
    if len(leaves) < len(rows):
        raise ThetaError(
            f"{owner} has θ for {len(rows)} parameters, but the config's target_parameters name {len(leaves)} "
            f"({', '.join(leaves)}); config and weights come from different trainings"
        )
    known = {leaf: rank_of(f"{owner}.{leaf}") for leaf in leaves}
    possible = {
        tuple(known[leaf] for leaf in order)
        for order in permutations(leaves, len(rows))
        if all(count % known[leaf][0] == 0 for count, leaf in zip(rows.values(), order, strict=True))
        and len({count // known[leaf][0] for count, leaf in zip(rows.values(), order, strict=True)} - {1}) <= 1
    }
    if not possible:
        raise ThetaError(
            f"{owner}: lora_A has {', '.join(map(str, rows.values()))} rows, which is not r times the same number of "
            f"experts for r = {', '.join(str(r) for r, _ in known.values())}, as the config says"
        )
    if len(possible) > 1:
        raise AdapterConfigError(
            f"{owner}: rank_pattern and alpha_pattern differ for {', '.join(leaves)}, and the shapes do not show "
            "which θ is of which; leave out target_parameters that the module does not have"
        )
    return dict(zip(rows, possible.pop(), strict=True))
