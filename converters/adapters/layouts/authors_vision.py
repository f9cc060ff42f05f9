"""The PEANuT authors' image-classification code: θ under `attention.attention`, and `<dense>.adapter`.

Their forward pass adds `1.0 * adapter(x, W0)`: the scaling is 1 unless someone changed the code.
"""

from converters.adapters.adapter import Adapter
from converters.adapters.layouts.authors_state_dict import class_beside, read_modules, sort_keys
from converters.adapters.layouts.layout import Layout, build_adapter
from converters.adapters.source import AdapterSource
from converters.adapters.targeting import ALL_LINEAR, Targeting
from converters.errors import LayoutError, ThetaError

_DENSE = ("intermediate.dense", "output.dense")


def claims(source: AdapterSource) -> str | None:
    """Keys with q_adapter, v_adapter or adapter that are not under an `attention.self`."""
    keys = sort_keys(source)
    if keys is None or any(".self." in f".{module}" for module in keys.parts):
        return None
    whole = f", inside a whole model of {len(keys.embedded)} more tensors" if keys.embedded else ""
    return f"{source.weights.name} has keys like {next(iter(next(iter(keys.parts.values())).values()))}{whole}"


def read(source: AdapterSource, evidence: str, scaling: float | None) -> Adapter:
    """The adapter in `source`. Raises `ThetaError` when θ is incomplete, or its shapes do not fit each other."""
    keys = sort_keys(source)
    if keys is None:
        raise LayoutError(f"{source.path} holds no q_adapter, v_adapter or adapter")
    modules = read_modules(source, keys, 1.0 if scaling is None else scaling)
    dense = {module.split(".")[-2] + ".dense" for module in modules if module.endswith(".dense")}
    if dense and dense != set(_DENSE):
        raise ThetaError(
            f"{source.path}: only {dense.pop()} of the dense layers has θ; the authors' code adapts "
            f"{' and '.join(_DENSE)}, so the adapter is incomplete"
        )
    return build_adapter(
        source,
        LAYOUT.name,
        evidence,
        modules,
        keys.head,
        embedded=keys.embedded,
        targeting=Targeting(ALL_LINEAR),
        task_type="IMAGE_CLS",
        model_class=class_beside(source.folder),
    )


LAYOUT = Layout("authors-vision", claims, read)
