"""PEANuT: the tweaker f(W0; θ) of one module, in its three orientations. LoRA is one of them.

PEANuT (arXiv 2410.01870, §3.3) adapts a frozen weight by a small network that reads it, `W = W0 + f(W0; θ)`.
The last step of f is linear, so the update has an exact factorisation `f(W0; θ) = up @ down` of rank ≤ r,
at any depth and for any elementwise activation σ. With h the last hidden layer:

    columns   f = s · B σ(A W0)        A (r, out), B (out, r), h (r, in)    up = s · B      down = h
    rows      f = s · σ(W0 Aᵀ) Bᵀ      A (r, in),  B (in, r),  h (out, r)   up = s · h      down = Bᵀ
    free      f = s · σ(B) A           A (r, in),  B (out, r)               up = s · σ(B)   down = A

`columns` is what HF PEFT trains (`peft/tuners/peanut/layer.py`); `rows` is the paper's equation; `free` does
not read W0: with σ the identity it is LoRA, else the paper's nonlinear LoRA (§5.3). Deeper tweakers put r × r
layers between σ and B, usually with mirrored residuals (Fig. 2). Only a variant that ends in an activation
(`output_act_fn`) has no factors of rank r; it is evaluated from `up`, `down` and that activation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from converters.errors import ConversionError, ThetaError
from converters.files.blocks import block_rows
from converters.methods.base import Method, one_or_many
from converters.methods.peanut.activations import ACTIVATIONS, NEGATIVE_SLOPE
from converters.methods.peanut.theta import Orientation, Theta
from converters.methods.peanut.update import TweakerUpdate
from converters.methods.weight_delta import Reads, WeightShape


@dataclass(frozen=True, eq=False)
class Tweaker(Theta, Method):
    """θ of one module, see `Theta`."""

    name = "peanut"
    formula = "`W = W0 + f(W0; θ)` (PEANuT, [arXiv 2410.01870](https://arxiv.org/abs/2410.01870))"
    lora_rank = "r"
    remark = "PEANuT in every orientation; LoRA and its two ablations. With an activation on the output: no LoRA"

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Tweaker":
        """From A, B, encoders.0, ..., decoders.0, ...; see `Method.from_parts`."""
        encoders, decoders = (
            tuple(parts[f"{side}.{i}"] for i in range(sum(name.startswith(side) for name in parts)))
            for side in ("encoders", "decoders")
        )
        rest = {key: value for key, value in settings.items() if key != "orientation"}
        return cls(Orientation(settings["orientation"]), parts["A"], parts["B"], encoders, decoders, **rest)

    @property
    def parts(self) -> dict[str, Tensor]:
        """See `WeightDelta.parts`."""
        return {
            "A": self.a,
            "B": self.b,
            **{f"encoders.{i}": layer for i, layer in enumerate(self.encoders)},
            **{f"decoders.{i}": layer for i, layer in enumerate(self.decoders)},
        }

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {
            "orientation": self.orientation.value,
            "act_fn": self.act_fn,
            "scaling": self.scaling,
            "residual": self.residual,
            "output_act_fn": self.output_act_fn,
            "negative_slope": self.negative_slope,
        }

    @property
    def digest_facts(self) -> list[Any]:
        """See `Method.digest_facts`. People have recorded digests: this list does not change."""
        return list(self.settings.values())

    @property
    def facts(self) -> dict[str, Any]:
        """See `Method.facts`."""
        orientation, *rest = self.settings.items()
        return dict([orientation, ("r", self.r), ("depth", self.depth), *rest])

    @classmethod
    def describe(cls, modules: Sequence[Method]) -> dict[str, Any]:
        """See `Method.describe`. Settings that are rare are left out where no module has them."""
        facts = [one.facts for one in modules]
        shown = ["orientation", "r", "depth", "act_fn", "scaling"]
        shown += ["residual"] if not all(one["residual"] for one in facts) else []
        shown += ["output_act_fn"] if any(one["output_act_fn"] for one in facts) else []
        shown += ["negative_slope"] if any("leaky_relu" in (f["act_fn"], f["output_act_fn"]) for f in facts) else []
        return {key: one_or_many(one[key] for one in facts) for key in shown}

    @property
    def rank(self) -> int | None:
        """See `WeightDelta.rank`."""
        return self.r if self.output_act_fn is None else None

    @property
    def full_rank_reason(self) -> str | None:
        """See `WeightDelta.full_rank_reason`."""
        if self.output_act_fn is None:
            return None
        return f"ends in an activation ({self.output_act_fn}), so it is not of low rank"

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        if self.orientation is Orientation.FREE:
            return self.b.shape[0], self.a.shape[1]
        return (self.a.shape[1], None) if self.orientation is Orientation.COLUMNS else (None, self.a.shape[1])

    def _mismatch_cause(self, shape: tuple[int, ...]) -> str:
        small = any(size is not None and size < self.r for size in self.weight_shape)
        swapped = len(shape) == 2 and self.r in shape and small
        return "A and B look swapped" if swapped else super()._mismatch_cause(shape)

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return {
            Orientation.FREE: Reads.NOTHING,
            Orientation.ROWS: Reads.ROWS,
            Orientation.COLUMNS: Reads.COLUMNS,
        }[self.orientation]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Tweaker":
        """See `WeightDelta.to`."""
        return self.from_parts(self.parts_on(device, dtype), self.settings)

    def times(self, weight: float) -> "Tweaker":
        """See `WeightDelta.times`: the weight goes into s, so that the factors stay exact."""
        return replace(self, scaling=self.scaling * weight)

    def transposed(self) -> "Tweaker":
        """The tweaker g with `g(W0ᵀ) = f(W0)ᵀ`, for weights that are stored as (in, out).

        Raises `ThetaError` for nonlinear LoRA, where σ would have to move to the other factor.
        """
        if self.orientation is Orientation.FREE:
            if self.act_fn != "linear":
                raise ThetaError("nonlinear LoRA is not defined for weights that are stored transposed (Conv1D)")
            return replace(self, a=self.b.T, b=self.a.T)
        rows = self.orientation is Orientation.ROWS
        return replace(self, orientation=Orientation.COLUMNS if rows else Orientation.ROWS)

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        update = self.update((w0.shape[0], w0.shape[1]), self.a.dtype, w0.device)
        return update.factors(torch.split(w0, block_rows(w0.shape[1]))).delta()

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`."""
        if self.orientation is Orientation.FREE:
            up, down = self.hidden(self.b[rows]), self.a[:, columns]
        elif self.orientation is Orientation.COLUMNS:
            up, down = self.b[rows], self.hidden(self.a @ w0)
        else:
            up, down = self.hidden(self.a @ w0.T).T, self.b[columns].T
        return self.as_factors(up, down).delta(), abs(self.scaling) * (up.abs() @ down.abs())

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> TweakerUpdate:
        """See `WeightDelta.update`."""
        return TweakerUpdate(self.to(device, dtype), shape[1], dtype, device)

    def peanut_config(self) -> dict[str, Any]:
        """r, depth, act_fn and scaling of a PeanutConfig (`peft/tuners/peanut/config.py`) that does the same.

        Raises `ConversionError` where there is none.
        """
        reason = None
        if self.orientation is not Orientation.COLUMNS:
            reason = f"its orientation is {self.orientation.value}, PEFT knows columns only"
        elif self.output_act_fn is not None:
            reason = "it has an activation on the output"
        elif self.depth and not self.residual:
            reason = "its hidden layers have no residuals"
        elif self.act_fn not in ACTIVATIONS:
            reason = f"its activation {self.act_fn} is not one of transformers"
        elif self.act_fn == "leaky_relu" and self.negative_slope != NEGATIVE_SLOPE:
            reason = f"its leaky_relu has the slope {self.negative_slope:g}, not {NEGATIVE_SLOPE}"
        if reason is not None:
            raise ConversionError(reason)
        return {"r": self.r, "depth": self.depth, "act_fn": self.act_fn, "scaling": self.scaling}
