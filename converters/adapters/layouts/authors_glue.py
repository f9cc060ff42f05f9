"""The PEANuT authors' GLUE code: θ under `attention.self`. The scale s is never saved."""

import re
from collections.abc import Iterable

from converters.adapters.adapter import Adapter
from converters.adapters.layouts.authors_state_dict import class_beside, read_modules, sort_keys
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.source import AdapterSource
from converters.adapters.targeting import ALL_LINEAR, Targeting
from converters.errors import LayoutError, MissingScalingError, ThetaError

# their small variant adapts the layers whose name has one of these numbers in it (`set_peanut_s`)
_SMALL = r".*\.\d*(?:4|5|6|7|8|9|10|11)\d*\..*"


def claims(source: AdapterSource) -> str | None:
    """Keys with q_adapter or v_adapter under an `attention.self`."""
    keys = sort_keys(source)
    if keys is None or not all(".self." in f".{module}" for module in keys.parts):
        return None
    whole = f", inside a whole model of {len(keys.embedded)} more tensors" if keys.embedded else ""
    return f"{source.weights.name} has keys like {next(iter(next(iter(keys.parts.values())).values()))}{whole}"


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`.

    Raises:
        MissingScalingError: no scaling was given.
        ThetaError: θ is incomplete, or its shapes do not fit each other.
    """
    keys = sort_keys(source)
    if keys is None:
        raise LayoutError(f"{source.path} holds no q_adapter or v_adapter")
    if scaling is None:
        raise MissingScalingError(
            f"{source.path} is from the PEANuT authors' GLUE code, which does not save the scale s: give scaling=, "
            "the one used in training (0.01, 0.1 or 1.0 in the paper)"
        )
    modules = read_modules(source, keys, scaling)
    return build_adapter(
        source,
        LAYOUT.name,
        evidence,
        modules,
        keys.head,
        embedded=keys.embedded,
        targeting=_targeting(source, modules),
        task_type="SEQ_CLS",
        model_class=class_beside(source.folder),
    )


LAYOUT = Layout("authors-glue", claims, read)


def _targeting(source: AdapterSource, modules: Iterable[str]) -> Targeting:
    """Which layers must have θ: all, or those of the small variant if the first has none."""
    layers = {int(number) for module in modules for number in re.findall(r"\.(\d+)\.", module)[:1]}
    if 0 in layers:
        return Targeting(ALL_LINEAR)
    unexpected = sorted(layer for layer in layers if not re.fullmatch(_SMALL, f".{layer}."))
    if unexpected:
        raise ThetaError(
            f"{source.path}: layer {unexpected[0]} has θ and layer 0 has none; the authors' code adapts all layers, "
            "or (PEANuT-S) those from 4 on, so the adapter is incomplete"
        )
    return Targeting(ALL_LINEAR, exclude_modules=rf"(?!{_SMALL}).*")
