"""RoAd: the outputs are rotated and scaled in pairs: `W = R W0` and `b = R b0`.

In every group of `group_size` outputs, output i of the first half and output i of the second are a pair:
`y1' = α cos θ · y1 − α sin θ · y2` and `y2' = α sin θ · y1 + α cos θ · y2`. The variants differ in how many angles
and scales a pair has: one of each, two, or four. Source: arXiv 2409.00119; HF PEFT's `peft/tuners/road/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, ThetaError
from converters.methods.peft_form import PeftForm, Shapes, integer
from converters.methods.shapes import Axes
from converters.methods.stored import StoredMethod
from converters.methods.update import Update
from converters.methods.weight_delta import Reads, WeightDelta, WeightShape

_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}  # variant -> angles of a pair of outputs


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    if config["variant"] not in tuple(_NUMBERS):  # a tuple: it may be a list, which has no hash
        raise AdapterConfigError(f"variant = {config['variant']!r}; known are {', '.join(_NUMBERS)}")
    return {"variant": config["variant"], "group_size": integer(config, "group_size", low=2)}


@dataclass(frozen=True, eq=False)
class RoAd(StoredMethod):
    """θ of one module: angles θ and scales α, (n · out / 2,) each, for n of them in a pair of outputs."""

    name = "road"
    formula = "`W = R·W0`, R rotating and scaling pairs of outputs (RoAd, [arXiv 2409.00119](https://arxiv.org/abs/2409.00119))"
    remark = "Biases, too. All variants"
    axes: ClassVar[Mapping[str, Axes]] = {"theta": ("numbers",), "alpha": ("numbers",)}
    peft = PeftForm(
        peft_type="ROAD",
        parameters={"road_theta": "theta", "road_alpha": "alpha"},
        mark="road_",
        fields=("variant", "group_size"),
        settings=_settings,
    )

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        out = 2 * sizes["numbers"] // _NUMBERS[self.given["variant"]]
        if self.given["group_size"] % 2 or out % self.given["group_size"]:
            raise ThetaError(
                f"θ has {sizes['numbers']} angles, which are no whole groups of {self.given['group_size']} outputs "
                f"of {self.given['variant']}"
            )

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return 2 * self.sizes["numbers"] // _NUMBERS[self.given["variant"]], None

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`: a pair of outputs may be far apart."""
        return Reads.COLUMNS

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "rotates and scales all outputs (RoAd), so it is not of low rank"

    @property
    def bias(self) -> WeightDelta:
        """See `Method.bias`: the outputs include it."""
        return replace(self)

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """What an output keeps of itself, and what it takes of its partner, without the sign; (out, 1) each."""
        half, variant = self.given["group_size"] // 2, self.given["variant"]
        theta, alpha = self.theta["theta"], self.theta["alpha"]
        if variant == "road_1":  # the same for both outputs of a pair
            theta, alpha = (t.reshape(-1, 1, half).expand(-1, 2, -1).reshape(-1) for t in (theta, alpha))
        if variant != "road_4":
            return (alpha * theta.cos())[:, None], (alpha * theta.sin())[:, None]
        (first, second), (scale, other) = (t.reshape(-1, 2, 2 * half).unbind(1) for t in (theta, alpha))
        return (scale * first.cos()).reshape(-1, 1), (other * second.sin()).reshape(-1, 1)

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        return self.turned(w0, *self.columns)

    def turned(self, w0: Tensor, keep: Tensor, take: Tensor) -> Tensor:
        """The rows of the delta for whole groups of rows of W0 (n, in), with their `columns` (n, 1)."""
        first, second = w0.reshape(-1, 2, self.given["group_size"] // 2, w0.shape[1]).unbind(1)
        partner = torch.stack([-second, first], dim=1).reshape(w0.shape)
        return ((keep - 1) * w0 + take * partner) * self.weight

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` has whole columns."""
        found = self.delta(w0)[rows]
        return found, found.abs()

    def update(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Update:
        """See `WeightDelta.update`."""
        return TurnedGroups(self.with_parts(self.parts_on(device, dtype)), dtype, device)


class TurnedGroups(Update):
    """Groups of rows are turned as the blocks pass by; those that a block ends in are kept in a first pass."""

    needs_pass = True

    def __init__(self, theta: RoAd, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._theta, self._size = theta, theta.given["group_size"]
        self._keep, self._take = theta.columns
        self._cut: dict[int, Tensor] = {}  # number of the group -> its rows of W0

    def see(self, w0: Tensor, start: int) -> None:
        """Keep the rows of groups that are not whole in this block."""
        for rows in self._groups(start, start + w0.shape[0]):
            group = rows.start // self._size
            first = group * self._size
            if rows.stop - rows.start < self._size:
                kept = self._cut.setdefault(group, w0.new_empty(self._size, w0.shape[1]))
                kept[rows.start - first : rows.stop - first] = w0[rows.start - start : rows.stop - start]

    def settle(self) -> None:
        """See `Update.settle`: the rows that were kept are all that is needed."""

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the delta."""
        pieces = []
        for rows in self._groups(start, start + w0.shape[0]):
            if rows.stop - rows.start < self._size:
                group = rows.start // self._size
                first = group * self._size
                turned = self._turned(self._cut[group], first)
                pieces.append(turned[rows.start - first : rows.stop - first])
            else:
                pieces.append(self._turned(w0[rows.start - start : rows.stop - start], rows.start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _turned(self, w0: Tensor, first: int) -> Tensor:
        rows = slice(first, first + w0.shape[0])
        return self._theta.turned(w0, self._keep[rows], self._take[rows])

    def _groups(self, start: int, end: int) -> list[slice]:
        """The rows from `start` to `end`: a part of a group, whole groups, a part of a group, as far as there are."""
        whole = -(-start // self._size) * self._size
        bounds = [start, *(row for row in (whole, end - end % self._size) if start < row < end), end]
        return [slice(*pair) for pair in pairwise(dict.fromkeys(bounds))]
