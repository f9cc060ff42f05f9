"""TinyLoRA: `W = W0 + B (Σ v_i P_i) A`, A and B from the SVD of W0, P random, v trained and shared by groups.

A, B and P are saved with every module, v once for a group, under its number. A module's group follows from its place
among all modules in the order of the model, which an adapter does not record; but HF PEFT seeds P with that place, so
that P shows it. Source: arXiv 2602.04118; HF PEFT's `peft/tuners/tinylora/layer.py`, `model.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, ThetaError
from converters.methods.low_rank.low_rank import LowRank
from converters.methods.peft_form import PeftForm, Shapes, integer, number, save_again
from converters.methods.shapes import Axes

_COMPARED = 64  # of the numbers of P
_HALF = 2.0**-7  # P may have been rounded to the dtype of the base


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    (r, width), out, found = shapes["A"], shapes["B"][0], shapes["v"][0]
    if r != min(integer(config, "r", low=1), out, width):
        raise ThetaError(f"{module}: θ has r = {r}, the config says r = {config['r']}; they disagree")
    if found != integer(config, "u", low=1):
        raise ThetaError(f"{module}: v has {found} numbers, the config says u = {config['u']}; they disagree")
    return {}


def _groups(config: Mapping[str, Any], modules: Sequence[str], read: Callable[[str, str], Tensor]) -> dict[str, str]:
    """The number of the v that each module has (`TinyLoraModel._create_and_replace`)."""
    tying = number(config, "weight_tying")
    if not 0 <= tying <= 1:
        raise AdapterConfigError(f"weight_tying = {tying:g}; expected a number from 0 to 1")
    count = max(1, round(len(modules) * (1 - tying)))
    if count == 1:
        return dict.fromkeys(modules, "0")
    size = max(1, len(modules) // count)
    places = _places(modules, read, integer(config, "projection_seed", low=0))
    return {module: str(min(place // size, count - 1)) for module, place in places.items()}


def _places(modules: Sequence[str], read: Callable[[str, str], Tensor], seed: int) -> dict[str, int]:
    """The place of every module in the order of the model: the one whose seed gives its P."""
    drawn: dict[tuple[int, ...], Tensor] = {}
    places: dict[str, int] = {}
    for module in modules:
        p = read(module, "P")
        shape = tuple(p.shape)
        if len(shape) != 3 or shape[1] != shape[2] or not p.numel():
            raise ThetaError(f"{module}: tinylora_P has shape {shape}; expected (u, r, r)")
        if shape not in drawn:
            drawn[shape] = torch.stack([_projection(shape, seed + place) for place in range(len(modules))])
        near = (drawn[shape] - p.reshape(-1)[:_COMPARED]).abs() <= _HALF * drawn[shape].abs() + 1e-6
        found = near.all(1).nonzero().flatten().tolist()
        if len(found) != 1:
            raise ThetaError(
                f"{module}: which tinylora_v it shares depends on the order of the base's modules, which only its "
                f"tinylora_P shows; that is {'none' if not found else 'more than one'} of those that projection_seed "
                f"{seed} gives for {len(modules)} modules; merge the adapter with PEFT where it was trained"
            )
        places[module] = found[0]
    if len(set(places.values())) != len(modules):
        raise ThetaError("two modules have the same tinylora_P; merge the adapter with PEFT where it was trained")
    return places


def _projection(shape: tuple[int, ...], seed: int) -> Tensor:
    """The first numbers of the P that HF PEFT draws with this seed (`TinyLoraLayer._init_projection`)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(0.0, shape[-1] ** -0.5, shape, generator=generator).reshape(-1)[:_COMPARED]


@dataclass(frozen=True, eq=False)
class TinyLora(LowRank):
    """θ of one module: A (r, in), B (out, r), P (u, r, r), and v (u,) of its group."""

    name = "tinylora"
    formula = "`W = W0 + B·(Σ v·P)·A` (TinyLoRA, [arXiv 2602.04118](https://arxiv.org/abs/2602.04118))"
    lora_rank = "r"
    remark = "Needs `save_projection=True`, PEFT's default"
    axes: ClassVar[Mapping[str, Axes]] = {"A": ("r", "in"), "B": ("out", "r"), "P": ("u", "r", "r"), "v": ("u",)}
    peft = PeftForm(
        peft_type="TINYLORA",
        parameters={f"tinylora_{part}": part for part in "ABP"},
        grouped={"tinylora_v": "v"},
        groups=_groups,
        missing="the random projections were not saved (save_projection is false); they depend on the version of "
        f"torch and on the order of all modules in the base; {save_again('save_projection')}",
        mark="tinylora_",
        fields=("r", "u", "weight_tying", "projection_seed"),
        inert=("save_projection", "init_v_bound", "tinylora_dropout"),
        settings=_settings,
    )

    def up_and_down(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """See `LowRank.up_and_down`."""
        middle = torch.einsum("i,ijk->jk", self.theta["v"], self.theta["P"])
        return self.theta["B"] @ middle, self.theta["A"]
