"""What an adapter is: its facts, as the manifest, the model card and `peanut-inspect` show them."""

import re
from collections.abc import Iterable
from typing import Any

from converters.adapters.adapter import Adapter


def split_module(module: str) -> tuple[str, str]:
    """(layer, kind) of a module: `model.layers.3`, `self_attn.q_proj`; the layer is empty outside of layers."""
    found = re.match(r"(.*\.\d+)\.(.+)", module)  # up to the last number
    return (found[1], found[2]) if found else ("", module)


def shortened(names: Iterable[str], least: int = 1) -> dict[str, str]:
    """Name -> its last parts, as few (but `least`) as tell all of them apart."""
    parts = {name: name.split(".") for name in sorted(names)}
    for count in range(least, max((len(p) for p in parts.values()), default=0) + 1):
        short = {name: ".".join(p[-count:]) for name, p in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in parts}


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """What the mathematics needs besides θ: a value, or a list where it is not the same for all modules."""
    thetas = list(adapter.modules.values())

    def one_or_many(values: Iterable[Any]) -> Any:
        found = sorted(set(values), key=lambda value: (value is None, value))
        return found[0] if len(found) == 1 else found

    facts = {
        "orientation": one_or_many(theta.orientation.value for theta in thetas),
        "r": one_or_many(adapter.rank(module) for module in adapter.modules),
        "depth": one_or_many(theta.depth for theta in thetas),
        "act_fn": one_or_many(theta.act_fn for theta in thetas),
        "scaling": one_or_many(theta.scaling for theta in thetas),
    }
    if not all(theta.residual for theta in thetas):
        facts["residual"] = one_or_many(theta.residual for theta in thetas)
    if any(theta.output_act_fn for theta in thetas):
        facts["output_act_fn"] = one_or_many(theta.output_act_fn for theta in thetas)
    if any("leaky_relu" in (theta.act_fn, theta.output_act_fn) for theta in thetas):
        facts["negative_slope"] = one_or_many(theta.negative_slope for theta in thetas)
    return facts


def describe(adapter: Adapter) -> dict[str, Any]:
    """The facts of an adapter, as JSON has them."""
    rival = f" or {adapter.rival}: only the base's shapes can tell" if adapter.rival else ""
    return {
        "adapter": adapter.name,
        "layout": adapter.layout + rival,
        "evidence": adapter.evidence,
        **settings_of(adapter),
        "parameters": adapter.parameter_count,
        "modules": len(adapter.modules),
        "targets": sorted({module.rsplit(".", 1)[-1] for module in adapter.modules}),
        "modules_to_save": sorted(adapter.saved),
        "base_weights_inside": len(adapter.embedded),
        "trained_on": adapter.base_name,
        "task_type": adapter.task_type,
        "recorded_base": adapter.base_fingerprint,
        "digest": adapter.digest,
    }


def module_shapes(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Per module: shapes of A and B, r, depth and scaling."""
    shapes = adapter.store.shapes
    return {
        module: {
            "A": list(shapes[theta.a]),
            "B": list(shapes[theta.b]),
            "r": adapter.rank(module),
            "depth": theta.depth,
            "scaling": theta.scaling,
        }
        for module, theta in adapter.modules.items()
    }
