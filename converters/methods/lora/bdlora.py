"""BD-LoRA: `W = W0 + s · B A`, with A or B block-diagonal; its blocks are saved one below another.

Which of the two it is, the config says by parts of module names. Source: HF PEFT's `peft/tuners/lora/variants.py`
(`BdLoraLinearVariant`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, ThetaError
from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, as_boolean, as_integer
from converters.methods.shapes import Axes
from converters.methods.weight_delta import WeightShape

_SIDES = {"A": "target_modules_bd_a", "B": "target_modules_bd_b"}


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    """How many blocks A has, and B."""
    given = config["use_bdlora"]
    known = {*_SIDES.values(), "nblocks", "match_strict"}
    if not isinstance(given, dict) or not set(given) <= known:
        raise AdapterConfigError(f"use_bdlora = {given!r}; expected an object of {', '.join(sorted(known))}")
    blocks = as_integer("nblocks", given.get("nblocks", 1), low=1)
    found = {side: any(part in module for part in _names(given, field)) for side, field in _SIDES.items()}
    if all(found.values()):
        raise AdapterConfigError(f"use_bdlora: {module} is in both {' and '.join(_SIDES.values())}")
    if as_boolean("match_strict", given.get("match_strict", True)) and not any(found.values()):
        raise AdapterConfigError(f"use_bdlora: {module} is in neither of {' and '.join(_SIDES.values())}")
    return {f"blocks_{side}": blocks if is_diagonal else 1 for side, is_diagonal in found.items()}


def _names(given: Mapping[str, Any], field: str) -> list[str]:
    names = given.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterConfigError(f"{field} = {names!r}; expected a list of parts of module names")
    return names


@dataclass(frozen=True, eq=False)
class BdLora(LowRank):
    """θ of one module: A (r, in/n) or B (out, r/n), and the other one whole."""

    name = "bd-lora"
    formula = "`W = W0 + s·BA`, A or B block-diagonal (BD-LoRA, [arXiv 2510.23346](https://arxiv.org/abs/2510.23346))"
    lora_rank = "r"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in/n"), "B": ("out", "r/n")}
    peft = PeftForm(
        peft_type="LORA",
        flag="use_bdlora",
        parameters={"lora_A": "A", "lora_B": "B"},
        mark="lora_",
        settings=_settings,
    )

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        of_a, of_b = self.given["blocks_A"], self.given["blocks_B"]
        if sizes["r"] % of_a or sizes["out"] % of_b or sizes["r/n"] * of_b != sizes["r"]:
            raise ThetaError(
                f"A has shape {tuple(self.theta['A'].shape)}, in {of_a} blocks, B {tuple(self.theta['B'].shape)}, in "
                f"{of_b}; the blocks do not fit"
            )

    @property
    def module_shape(self) -> WeightShape:
        """See `LowRank.module_shape`."""
        return self.sizes["out"], self.sizes["in/n"] * self.given["blocks_A"]

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        a, b = (_block_diagonal(self.theta[side], self.given[f"blocks_{side}"]) for side in ("A", "B"))
        return b * self.given["scaling"], a


def _block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """(n, count · m), of `count` blocks that stand one below another in (n, m)."""
    matrix: Tensor = torch.block_diag(*blocks.chunk(count))  # type: ignore[no-untyped-call]
    return matrix
