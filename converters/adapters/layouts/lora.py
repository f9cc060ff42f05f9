"""Plain LoRA as HF PEFT writes it, and the paper's ablation nonlinear LoRA under the same names.

lora_A (r, in), lora_B (out, r); `W0 + s · lora_B lora_A`, with s = lora_alpha / r, or lora_alpha / √r under rsLoRA
(`peft/tuners/lora/layer.py`). Nonlinear LoRA (arXiv 2410.01870, §5.3) is `W0 + s · σ(A) B` with σ = ReLU; its A, the
left factor, is lora_B. No code writes it, so it is read only where the user asks for it.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.base_record import RESIDUAL_NAME
from converters.adapters.layouts.layout import Layout
from converters.adapters.layouts.lora_names import (
    INERT_FIELDS,
    ScalingOf,
    find_shapes,
    find_variant,
    read_modules,
    says,
)
from converters.adapters.layouts.peft_config import boolean, integer, located, number, targeting_of
from converters.adapters.parameters import find_ranks, owners
from converters.adapters.source import AdapterSource
from converters.errors import AdapterConfigError, ThetaError
from converters.methods.base import Method
from converters.methods.lora.conv_dora import ConvDora
from converters.methods.lora.expert_lora import ExpertLora
from converters.methods.lora.other_lora import ConvLora
from converters.methods.multiplicative.dora import Dora
from converters.methods.peanut.theta import Orientation
from converters.methods.peanut.tweaker import Tweaker
from converters.methods.peft_form import first_match
from converters.methods.table import LORA_INITS

_MATH_FIELDS = ("r", "lora_alpha")
_CHECKED_FIELDS = (
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
)
# initialisations that leave the base weights as they are
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# initialisations that change the base weights by what is not saved: beginning of the name -> what that is
_LOST = {
    "pissa_niter_": "random numbers (a randomized SVD; only 'pissa' is computed again)",
    "corda": "statistics of the data",
    "loftq": "how the base was quantized",
    "lora_ga": "gradients",
    "milora": "the smallest singular parts of the base, found by code outside HF PEFT",
}


def claims(source: AdapterSource) -> str | None:
    """LORA in the config, or LoRA's keys. Where every lora_B is (d, r), so do the authors' files."""
    shapes = find_shapes(source)
    if shapes is None:
        return None
    variant = find_variant(source)
    if variant is not None:
        return f"{says(source)} with {variant[1].flag}"
    for module, (a, b) in shapes.items():
        if a != b[::-1]:
            return f"{says(source)}; {module} has lora_A {a}, lora_B {b}: (r, in), (out, r)"
    return f"{says(source)}; " + ("every lora_B is (d, r) with lora_A (r, d)" if shapes else "on embeddings")


def claims_nonlinear(source: AdapterSource) -> str | None:
    """As `claims`; it is the user who says that σ belongs there."""
    evidence = claims(source) if find_variant(source) is None else None
    return None if evidence is None else f"{evidence}; --layout says nonlinear"


def read(source: AdapterSource, evidence: str, scaling: float | None, nonlinear: bool = False) -> Adapter:
    """The adapter in `source`; raises as `read_modules` does."""
    name, act_fn = ("nonlinear-lora", "relu") if nonlinear else ("lora", "linear")
    variant = find_variant(source)
    residual = _residual_method(source, name if variant is None else variant[0].name)
    parameters = {} if nonlinear or variant is not None else _find_parameters(source, residual)

    def theta_of(module: str, keys: Mapping[str, str], s: float, fan_in_fan_out: bool) -> ModuleTheta:
        """θ of one module, after a look at the shapes of its factors."""
        a, b = source.store.shapes[keys["A"]], source.store.shapes[keys["B"]]
        if variant is not None:
            method, form = variant
            if len(a) > 2 and method is Dora:
                return ModuleTheta(ConvDora, keys, {"scaling": s})
            if len(a) > 2:
                raise ThetaError(
                    f"{module}: lora_A has shape {a}, as of a convolution, and {form.flag} is read on linear layers "
                    "only; use the adapter in PEFT, unmerged"
                )
            with located(source.config_path):
                settings = form.settings(source.config or {}, module, {"A": a, "B": b})
            return ModuleTheta(method, keys, {"scaling": s, **settings}, fan_in_fan_out)
        if len(a) > 2 and not nonlinear and residual is None:
            return ModuleTheta(ConvLora, keys, {"scaling": s})
        if not len(a) == len(b) == 2 or a[0] != b[1]:
            raise ThetaError(f"{module}: lora_A has shape {a}, lora_B {b}; expected (r, in) and (out, r)")
        if residual is not None:
            return ModuleTheta(residual, keys, {"scaling": s}, fan_in_fan_out)
        if module in parameters:
            given = {"scaling": s, "experts": a[0] // parameters[module][0], "transposed": False}
            version = (source.config or {}).get("peft_version")
            return ModuleTheta(ExpertLora, keys, {**given, "peft_version": version})
        settings = {"orientation": Orientation.FREE.value, "act_fn": act_fn, "scaling": s}
        return ModuleTheta(Tweaker, keys, settings, fan_in_fan_out)

    inert = (*INERT_FIELDS, *_CHECKED_FIELDS, *(["target_parameters"] if parameters else []))
    find_scaling = partial(_scaling_of, source, parameters)
    math = (*_MATH_FIELDS, *(variant[1].fields if variant is not None else ()))
    return read_modules(source, name, evidence, scaling, math, inert, find_scaling, theta_of)


LORA = Layout("lora", claims, read)
NONLINEAR_LORA = Layout("nonlinear-lora", claims_nonlinear, partial(read, nonlinear=True), asked_only=True)


_CONVERT = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"


def _residual_method(source: AdapterSource, kind: str) -> type[Method] | None:
    """The method of an adapter of this kind whose initialisation changed the base; None if it did not.

    Raises `AdapterConfigError` for an initialisation that cannot be computed again, and for other kinds than LoRA.
    """
    config, where = source.config or {}, source.config_path
    init = config.get("init_lora_weights")
    if init in _PLAIN_INITS:
        return None
    found = LORA_INITS.get(str(init).lower())
    if found is None:
        lost = next((what for mark, what in _LOST.items() if str(init).lower().startswith(mark)), None)
        raise AdapterConfigError(
            f"{where}: init_lora_weights = {init!r} changes the base weights, and the adapter is relative to those"
            + (f"; it depends on {lost}" if lost else "")
            + f"; {_CONVERT}"
        )
    if kind != "lora":
        raise AdapterConfigError(
            f"{where}: init_lora_weights is {found.name}, which is not read together with {kind}; {_CONVERT}"
        )
    base = str(config.get("base_model_name_or_path") or "")
    if RESIDUAL_NAME.search(base.rstrip("/").rsplit("/", 1)[-1]):
        raise AdapterConfigError(
            f"{where}: init_lora_weights = {init!r}, and base_model_name_or_path = '{base}' is by its name a base "
            "that was saved after the initialisation; if so, set init_lora_weights to true, and give that base; if "
            "not, correct the name"
        )
    return found


def _find_parameters(source: AdapterSource, residual: type[Method] | None) -> dict[str, tuple[int, float]]:
    """(r, s) of every module of the weights that is a wrapper of one of the config's target_parameters."""
    config, where = source.config or {}, source.config_path or source.path
    named = config.get("target_parameters")
    if not named:
        return {}
    if residual is not None:
        raise AdapterConfigError(
            f"{where}: init_lora_weights is {residual.name}, which is not read together with target_parameters; "
            f"{_CONVERT}"
        )
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named):
        raise AdapterConfigError(f"{where}: target_parameters = {named!r}; expected a list of names")
    shapes, rank_of = find_shapes(source) or {}, _rank_and_scaling(source, config)
    targeting = targeting_of(where, config)
    by_module = targeting is not None and not targeting.all_linear
    others = [m for m in shapes if not (by_module and targeting is not None and targeting.matches(m))]
    found: dict[str, tuple[int, float]] = {}
    for owner, wrappers in owners(others, named).items():
        rows = {module: shapes[module][0][0] if shapes[module][0] else 0 for module in wrappers}
        found |= find_ranks(owner, rows, named, rank_of)
    if not found:
        raise ThetaError(
            f"{source.path}: the weights contain no θ for target_parameters {named}; the adapter is incomplete"
        )
    return found


def _scaling_of(
    source: AdapterSource, parameters: Mapping[str, tuple[int, float]], config: Mapping[str, Any]
) -> ScalingOf:
    """s by module, as PEFT has it; checks r by module on the way. `parameters` have theirs."""
    rank_of = _rank_and_scaling(source, config)

    def scaling(module: str, found: int) -> float:
        """s of one module, whose factors have the rank `found`."""
        if module in parameters:
            return parameters[module][1]
        wanted, s = rank_of(module)
        if found != wanted:
            raise ThetaError(
                f"{module}: lora_A has {found} rows, the config says r = {wanted}; they disagree, or A and B are "
                "swapped"
            )
        return s

    return scaling


def _rank_and_scaling(source: AdapterSource, config: Mapping[str, Any]) -> Callable[[str], tuple[int, float]]:
    """Module, or parameter -> (r, s), as the config has them."""
    where = source.config_path or source.path
    r = integer(where, "r", config["r"], 1)
    alpha = number(where, "lora_alpha", config["lora_alpha"])
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(table, dict):
            raise AdapterConfigError(f"{where}: {name} = {table!r}; expected an object")
        for pattern, value in table.items():
            integer(where, f"{name} {pattern}", value, 1) if table is ranks else number(where, name, value)
    rslora = boolean(where, "use_rslora", config.get("use_rslora") or False)

    def rank_and_scaling(module: str) -> tuple[int, float]:
        """(r, s) of one module."""
        with located(where):
            rank = ranks.get(first_match(ranks, module), r)
            numerator = float(alphas.get(first_match(alphas, module), alpha))
        return rank, numerator / (math.sqrt(rank) if rslora else rank)

    return rank_and_scaling
