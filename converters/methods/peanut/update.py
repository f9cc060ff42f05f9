"""The evaluation of a tweaker while the rows of W0 pass by."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from converters.methods.factors import Factors
from converters.methods.peanut.theta import Orientation, Theta
from converters.methods.update import Update


class TweakerUpdate(Update):
    """The update of one weight by a tweaker; holds `(out + in) * r` numbers.

    Args:
        theta: of the module, in this dtype and on this device.
        width: columns of W0.
        dtype, device: as for `Update`.
    """

    def __init__(self, theta: Theta, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._theta = theta
        self.needs_pass = theta.orientation is Orientation.COLUMNS
        if self.needs_pass:
            self._projected = torch.zeros(theta.r, width, dtype=dtype, device=device)
            self._terms = theta.as_factors(theta.b, self._projected)
        elif theta.orientation is Orientation.ROWS:
            self._terms = theta.as_factors(theta.b[:0], theta.b.T.contiguous())
        else:
            self._terms = theta.as_factors(theta.hidden(theta.b), theta.a)

    def see(self, w0: Tensor, start: int) -> None:
        """Project rows of W0 (n, in) that begin at row `start`."""
        self._projected.addmm_(self._theta.a[:, start : start + w0.shape[0]], w0)

    def settle(self) -> None:
        """All rows were seen: h is known."""
        self._terms = replace(self._terms, down=self._theta.hidden(self._projected))
        del self._projected

    def prepare(self, w0: Tensor, start: int) -> Tensor:
        """Rows of the left factor (n, r) for rows of W0 (n, in) that begin at row `start`."""
        if self._theta.orientation is not Orientation.ROWS:
            return self._terms.up[start : start + w0.shape[0]]
        h = self._theta.hidden(self._theta.a @ w0.T).T
        return h if self._theta.output_act_fn else h * self._theta.scaling

    def add_to(self, total: Tensor, prepared: Tensor) -> Tensor:
        """See `Update.add_to`."""
        return self._terms.add_to(total, prepared)

    def factors(self, blocks: Iterable[Tensor]) -> Factors:
        """See `Update.factors`; the blocks are not read if θ does not depend on W0."""
        if self.needs_pass:
            for start, w0 in self._numbered(blocks):
                self.see(w0, start)
            self.settle()
        if self._theta.orientation is not Orientation.ROWS:
            return self._terms
        return replace(self._terms, up=torch.cat([self.prepare(w0, start) for start, w0 in self._numbered(blocks)]))

    def norm(self, blocks: Callable[[], Iterable[Tensor]]) -> float:
        """See `Update.norm`: from the factors."""
        return self.factors(blocks()).norm()
