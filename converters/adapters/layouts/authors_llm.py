"""The PEANuT authors' LLM code, and the paper's ablation multiplicative LoRA under the same names.

Their code replaces LoRA's inside a fork of PEFT, so its folders say `peft_type: LORA`: lora_A (r, in), lora_B
(in, r), `W0 + s · ReLU(W0 lora_Aᵀ) lora_Bᵀ` with s = lora_alpha / r, the rows orientation (arXiv 2410.01870, §3.3;
their `commonsense&math/peft/src/peft/tuners/peanut.py`). Multiplicative LoRA (§5.3), `W0 + W0 A B`, is the same
without the activation; no code writes it, so it is read only where the user asks for it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from converters.adapters.adapter import Adapter, ModuleTheta
from converters.adapters.layouts.layout import Layout
from converters.adapters.layouts.lora_names import (
    INERT_FIELDS,
    ScalingOf,
    find_shapes,
    find_variant,
    read_modules,
    says,
)
from converters.adapters.layouts.peft_config import integer, number
from converters.adapters.layouts.peft_parts.embeddings import EMBEDDING_PARAMETERS
from converters.adapters.layouts.peft_parts.tokens import TOKENS_PARAMETER
from converters.adapters.source import AdapterSource
from converters.errors import ThetaError
from converters.methods.peanut.theta import Orientation
from converters.methods.peanut.tweaker import Tweaker

_MATH_FIELDS = ("r", "lora_alpha")


def claims(source: AdapterSource) -> str | None:
    """LORA in the config, with lora_B (d, r) for lora_A (r, d) everywhere."""
    shapes = find_shapes(source)
    if shapes is None or (source.config or {}).get("target_parameters"):
        return None
    if find_variant(source) is not None or not all(a == b[::-1] for a, b in shapes.values()):
        return None
    if any(f".{name}" in key for key in source.keys for name in (TOKENS_PARAMETER, *EMBEDDING_PARAMETERS)):
        return None  # not in their code; and an embedding's shape would not decide between the layouts
    return f"{says(source)}; every lora_B is (d, r) with lora_A (r, d)"


def claims_multiplicative(source: AdapterSource) -> str | None:
    """As `claims`; it is the user who says that no activation belongs there."""
    evidence = claims(source)
    return None if evidence is None else f"{evidence}; --layout says multiplicative"


def read(source: AdapterSource, evidence: str, scaling: float | None, multiplicative: bool = False) -> Adapter:
    """The adapter in `source`; raises as `read_modules` does."""
    name, act_fn = ("multiplicative-lora", "linear") if multiplicative else ("authors-llm", "relu")

    def theta_of(module: str, keys: Mapping[str, str], s: float, fan_in_fan_out: bool) -> ModuleTheta:
        a, b = source.store.shapes[keys["A"]], source.store.shapes[keys["B"]]
        if len(a) != 2 or b != a[::-1]:
            raise ThetaError(f"{module}: lora_A has shape {a}, lora_B {b}; expected (r, in) and (in, r)")
        settings = {"orientation": Orientation.ROWS.value, "act_fn": act_fn, "scaling": s}
        return ModuleTheta(Tweaker, keys, settings, fan_in_fan_out)

    find_scaling = partial(_scaling_of, source)
    return read_modules(source, name, evidence, scaling, _MATH_FIELDS, INERT_FIELDS, find_scaling, theta_of)


AUTHORS_LLM = Layout("authors-llm", claims, read)
MULTIPLICATIVE_LORA = Layout(
    "multiplicative-lora", claims_multiplicative, partial(read, multiplicative=True), asked_only=True
)


def _scaling_of(source: AdapterSource, config: Mapping[str, Any]) -> ScalingOf:
    """s = lora_alpha / r, one for all modules; checks r on the way."""
    where = source.config_path or source.path
    r = integer(where, "r", config["r"], 1)
    s = number(where, "lora_alpha", config["lora_alpha"]) / r

    def scaling(module: str, found: int) -> float:
        if found != r:
            raise ThetaError(
                f"{module}: lora_A has {found} rows, the config says r = {r}; they disagree, or A and B are swapped"
            )
        return s

    return scaling
