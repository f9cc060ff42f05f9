"""DEFT: `W = W0 + Q (s R − Kᵀ W0)`, a subspace of W0's columns replaced; once W0 is known, a LoRA of rank r.

Q and K (out, r) come from P: with `decomposition_method` `relu`, Q is P and K is relu(P); with `qr`, both are the
orthogonal factor of P. With `para` (PaRa) there is no R. Kᵀ W0 needs all rows of W0, so they pass by once before.
Source: HF PEFT's `peft/tuners/deft/layer.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, ThetaError
from converters.methods.factors import Factors
from converters.methods.oriented import Oriented
from converters.methods.peft_form import PeftForm, Shapes, boolean, integer, number
from converters.methods.shapes import Axes
from converters.methods.update import Update
from converters.methods.weight_delta import Reads

# what HF PEFT's float32 tells apart: below it, rounding decides the signs of the orthogonal factor
_FLOAT32 = 1e-5


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    decomposition = config["decomposition_method"]
    if decomposition not in ("relu", "qr"):
        raise AdapterConfigError(f"decomposition_method = {decomposition!r}; known are relu and qr")
    out, r = shapes["P"]
    if r != min(integer(config, "r", low=1), out):
        raise ThetaError(f"{module}: θ has r = {r}, the config says r = {config['r']}; they disagree")
    if boolean(config, "para") == ("R" in shapes):
        found = "there is" if "R" in shapes else "there is no"
        raise ThetaError(f"{module}: para is {str(config['para']).lower()}, and {found} deft_R; they disagree")
    return {"decomposition": decomposition, "scaling": number(config, "alpha") / r if config["alpha"] else 1.0}


@dataclass(frozen=True, eq=False)
class Deft(Oriented):
    """θ of one module: P (out, r), and R (r, in) unless it only removes."""

    name = "deft"
    formula = "`W = W0 + Q·(s·R − Kᵀ·W0)`, Q and K from P (DEFT; PaRa without R)"
    lora_rank = "r"
    remark = "`relu` and `qr`, also with `para`"
    axes: ClassVar[Mapping[str, Axes]] = {"P": ("out", "r"), "R": ("r", "in")}
    peft = PeftForm(
        peft_type="DEFT",
        parameters={"deft_P": "P", "deft_R": "R"},
        optional=frozenset({"R"}),
        mark="deft_",
        fields=("r", "decomposition_method", "alpha", "para"),
        inert=("init_scale", "deft_dropout"),
        settings=_settings,
    )

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return self.sizes["r"]

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.ROWS if self.is_transposed else Reads.COLUMNS

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """Q and K, each (out, r). Raises `ThetaError` when rounding decides what the orthogonal factor is."""
        p = self.theta["P"]
        if self.given["decomposition"] == "relu":
            return p, p.relu()
        q = _orthogonal_factor(p)
        return q, q

    def down(self, seen: Tensor, columns: slice | Tensor = slice(None)) -> Tensor:
        """`s R − Kᵀ W0` (r, n) at some columns of the module's weight, from `seen`, `Kᵀ W0` there."""
        if "R" not in self.theta:
            return -seen
        return self.theta["R"][:, columns] * float(self.given["scaling"]) - seen

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        q, k = self.directions
        weight = w0.T if self.is_transposed else w0
        delta = (q * self.weight) @ self.down(k.T @ weight)
        return delta.T if self.is_transposed else delta

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` has whole columns, or whole rows where it is stored as (in, out)."""
        (q, k), weight = self.directions, w0.T if self.is_transposed else w0
        of_out, of_in = (columns, rows) if self.is_transposed else (rows, columns)
        up, down = q[of_out] * self.weight, self.down(k.T @ weight, of_in)
        sums = down.abs() + k.T.abs() @ weight.abs()
        found, spread = up @ down, up.abs() @ sums
        return (found.T, spread.T) if self.is_transposed else (found, spread)

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        theta = self.with_parts(self.parts_on(device, dtype))
        return DeftRowsUpdate(theta, dtype, device) if self.is_transposed else DeftUpdate(theta, shape, dtype, device)


class DeftUpdate(Update):
    """`Kᵀ W0` is added up as the rows pass by, and then rows of Q multiply what is put in its place."""

    needs_pass = True

    def __init__(self, theta: Deft, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._theta = theta
        q, self._k = theta.directions
        self._up = q * theta.weight
        self._down = torch.zeros(theta.rank, shape[1], dtype=dtype, device=device)

    def see(self, w0: Tensor, start: int) -> None:
        """See `Update.see`."""
        self._down.addmm_(self._k[start : start + w0.shape[0]].T, w0)

    def settle(self) -> None:
        """See `Update.settle`."""
        self._down = self._theta.down(self._down)

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of Q (n, r)."""
        return self._up[start : start + w0.shape[0]]

    def add_to(self, total: Tensor, prepared: Tensor) -> Tensor:
        """See `Update.add_to`."""
        return total.addmm_(prepared, self._down)

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """See `Update.factors`."""
        for start, w0 in self._numbered(blocks):
            self.see(w0, start)
        self.settle()
        return Factors(self._up, self._down)


class DeftRowsUpdate(Update):
    """Of a weight that is stored as (in, out): its rows need nothing but themselves."""

    def __init__(self, theta: Deft, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._theta = theta
        q, self._k = theta.directions
        self._right = q.T * theta.weight

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the left factor (n, r)."""
        return self._theta.down(self._k.T @ w0.T, slice(start, start + w0.shape[0])).T

    def add_to(self, total: Tensor, prepared: Tensor) -> Tensor:
        """See `Update.add_to`."""
        return total.addmm_(prepared, self._right)

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """See `Update.factors`."""
        return Factors(torch.cat([self.prepare(w0, start) for start, w0 in self._numbered(blocks)]), self._right)


def _orthogonal_factor(p: Tensor) -> Tensor:
    """Q (out, r) of `P = Q U` with LAPACK's signs, which HF PEFT has as well.

    The signs come from Householder's reflections. Where rounding to float32 decides one of them, or a direction,
    there is no telling what the adapter was trained with. Raises `ThetaError` then.
    """
    on_cpu = p.cpu()
    reflectors, tau = torch.geqrf(on_cpu)
    diagonal = reflectors.diagonal().abs()
    if not bool((diagonal > _FLOAT32 * torch.linalg.vector_norm(on_cpu, dim=0)).all()):
        raise ThetaError("the columns of deft_P are not independent, so its QR decomposition is not unique")
    if bool(((tau - 1).abs() < _FLOAT32).any()):
        raise ThetaError(
            "the signs of the QR decomposition of deft_P are decided by rounding; merge it with the PEFT and "
            "the torch it was trained with"
        )
    orthogonal: Tensor = torch.linalg.householder_product(reflectors, tau)
    return orthogonal.to(p.device)
