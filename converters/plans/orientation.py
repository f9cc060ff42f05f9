"""How weights are stored, (out, in) or (in, out) as transformers' Conv1D has them, and what methods learn of it."""

from dataclasses import replace

from converters.adapters.adapter import Adapter, Weighted
from converters.files.header import TensorInfo
from converters.models.checkpoint import Checkpoint
from converters.plans.targets import Targets

# models whose linear layers are transformers' Conv1D, and what they call those layers
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder", "clvp")
_CONV1D_NAMES = ("c_attn", "c_fc", "c_proj", "q_attn")


def is_transposed(base: Checkpoint, adapter: Adapter, module: str, weight: TensorInfo) -> bool:
    """Whether a weight is stored as (in, out)."""
    if base.config.get("model_type") in _CONV1D_TYPES:
        return weight.name.removesuffix(".weight").rsplit(".", 1)[-1] in _CONV1D_NAMES
    return adapter.modules[module].fan_in_fan_out


def with_shapes(base: Checkpoint, weighted: Weighted, position: int, found: Targets) -> Weighted:
    """An adapter with what its methods have to know of the shapes of the base (`Method.settings_of_base`).

    Args:
        base: the base.
        weighted: the adapter.
        position: which of the adapters it is in `found`.
        found: what is updated.
    """
    adapter, shapes = weighted.adapter, {}
    for target in found.targets:
        weight = base.tensors[target.base_name]
        if target.adapter == position and target.parameter == "weight" and len(weight.shape) == 2:
            out, width = weight.shape
            if target.part is not None:
                out = target.part.rows[1] - target.part.rows[0]
            flipped = is_transposed(base, adapter, target.module, weight)
            shapes[target.module] = (width, out) if flipped else (out, width)
    modules = dict(adapter.modules)
    for method in {theta.method for theta in modules.values()}:
        own = {module: shape for module, shape in shapes.items() if modules[module].method is method}
        settings = method.settings_of_base(own) if own else {}
        if settings:
            modules |= {m: replace(modules[m], settings={**modules[m].settings, **settings}) for m in own}
    return weighted if modules == adapter.modules else replace(weighted, adapter=replace(adapter, modules=modules))
