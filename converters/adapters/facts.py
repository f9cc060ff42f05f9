"""The facts of an adapter that the manifest, the model card and `peanut-inspect` show."""

import re
from collections.abc import Iterable
from typing import Any

from converters.adapters.adapter import Adapter
from converters.methods.lora.expert_lora import ExpertLora

# the method, as facts have it, of an adapter that updates no weight
REPLACING = "tensors replaced whole"


def split_module(module: str) -> tuple[str, str]:
    """(layer, kind) of a module: `model.layers.3`, `self_attn.q_proj`; the layer is empty outside of layers."""
    found = re.match(r"(.*\.\d+)\.(.+)", module)  # up to the last number
    return (found[1], found[2]) if found else ("", module)


def shortened(names: Iterable[str], least: int = 1) -> dict[str, str]:
    """Name -> its last parts: as few as distinguish all of them, but at least `least`."""
    parts = {name: name.split(".") for name in sorted(names)}
    for count in range(least, max((len(p) for p in parts.values()), default=0) + 1):
        short = {name: ".".join(p[-count:]) for name, p in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in parts}


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """The settings of the formula: a value, or a list where modules differ."""
    modules = [adapter.describe(module) for module in adapter.modules]
    facts: dict[str, Any] = {} if modules else {"method": REPLACING}
    for method in dict.fromkeys(type(one) for one in modules):
        facts |= method.describe([one for one in modules if isinstance(one, method)])
    return facts


def describe(adapter: Adapter) -> dict[str, Any]:
    """The facts of an adapter, as JSON has them."""
    rival = f" or {adapter.rival}: only the shapes of the base decide" if adapter.rival else ""
    return {
        "adapter": adapter.name,
        "layout": adapter.layout + rival,
        "evidence": adapter.evidence,
        **settings_of(adapter),
        "parameters": adapter.parameter_count,
        "modules": len(adapter.modules),
        "targets": sorted({module.rsplit(".", 1)[-1] for module in adapter.modules}),
        "modules_to_save": sorted(adapter.saved),
        **({"layer_replication": adapter.layer_replication} if adapter.layer_replication else {}),
        "base_weights_inside": len(adapter.embedded),
        "trained_on": adapter.base_name,
        "task_type": adapter.task_type,
        "recorded_base": adapter.base_fingerprint,
        "digest": adapter.digest,
    }


def module_shapes(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Per module: shapes of the parts of θ (of hidden layers, their number), r, depth and scaling."""
    found: dict[str, dict[str, Any]] = {}
    for module, theta in adapter.modules.items():
        facts = adapter.describe(module).facts
        found[module] = {
            **{part: list(adapter.store.shapes[key]) for part, key in theta.parts.items() if "." not in part},
            **{name: facts[name] for name in ("r", "depth", "scaling") if name in facts},
        }
    return found


def module_methods(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Per module: its method, what that reads of W0, the rank of its exact factors or why it has none, settings."""
    found: dict[str, dict[str, Any]] = {}
    for module in adapter.modules:
        method = adapter.describe(module)
        facts = method.describe([method])
        is_parameter, rank = adapter.is_parameter(module), adapter.rank(module)
        repeated = {"method": method.name, "r": rank}
        settings = {key: value for key, value in facts.items() if repeated.get(key, object()) != value}
        found[module] = {
            "method": method.name,
            "reads": method.reads.value,
            "rank": rank,
            "rank_of_each_expert": isinstance(method, ExpertLora) and method.experts > 1,
            "full_rank_reason": None if is_parameter else method.full_rank_reason,
            "changes_bias": method.bias is not None,
            "settings": settings,
        }
    return found
