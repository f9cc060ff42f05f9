"""Trainable tokens: some rows of an embedding are replaced by trained ones.

HF PEFT's `peft/tuners/trainable_tokens/layer.py`; its `trainable_tokens_delta` is no delta, but the rows themselves.
An output head that is tied to the embedding stays tied, and changes with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, BaseMismatchError, ThetaError
from converters.methods.peft_form import PeftForm, Shapes
from converters.methods.row_wise import RowWise, Which
from converters.methods.shapes import Axes
from converters.methods.weight_delta import Reads, WeightShape


def token_settings(name: str, indices: Any) -> dict[str, Any]:
    """The settings of one module from the field `name` of a config. Raises `AdapterConfigError`."""
    if not isinstance(indices, list) or any(type(index) is not int or index < 0 for index in indices):
        raise AdapterConfigError(f"{name} = {indices!r}; expected a list of token indices, 0 or larger")
    if len(set(indices)) < len(indices):
        twice = next(index for position, index in enumerate(indices) if index in indices[:position])
        raise AdapterConfigError(f"{name} has {twice} twice; which of the two rows applies is not defined")
    return {"token_indices": indices}


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    return token_settings("token_indices", config["token_indices"])


@dataclass(frozen=True, eq=False)
class TrainableTokens(RowWise):
    """θ of one embedding, or of an output head: rows (k, in), and the indices of the k tokens they belong to."""

    name = "trainable-tokens"
    formula = "`W[i] = W_trained[i]` for the trained tokens i (trainable tokens)"
    remark = "A tied output head changes with the embedding. Also `LORA` with `trainable_token_indices`"
    peft = PeftForm(
        peft_type="TRAINABLE_TOKENS",
        parameters={"trainable_tokens_delta": "rows"},
        mark="trainable_tokens_delta",
        fields=("token_indices",),
        repeats_ties=True,
        settings=_settings,
    )
    axes: ClassVar[Mapping[str, Axes]] = {"rows": ("tokens", "in")}

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        if sizes["tokens"] != len(self.given["token_indices"]):
            raise ThetaError(
                f"θ has rows for {sizes['tokens']} tokens, the config names {len(self.given['token_indices'])}; "
                "they come from different trainings"
            )

    @property
    def weight_shape(self) -> WeightShape:
        """See `WeightDelta.weight_shape`."""
        return None, self.sizes["in"]

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        last = max(self.given["token_indices"])
        if last >= shape[0]:
            raise BaseMismatchError(
                f"{name}: token {last} was trained, the vocabulary of the base has {shape[0]}; give the base with "
                "the embedding that was resized for the training (resize_token_embeddings, then save_pretrained)"
            )

    @property
    def keeps_ties(self) -> bool:
        """See `Method.keeps_ties`."""
        return True

    @property
    def reads(self) -> Reads:
        """See `WeightDelta.reads`."""
        return Reads.NUMBER

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "replaces rows of the embedding (trainable tokens)"

    @property
    def facts(self) -> dict[str, Any]:
        """See `Method.facts`."""
        return {"method": self.name, "tokens": len(self.given["token_indices"])}

    def delta(self, w0: Tensor) -> Tensor:
        """See `WeightDelta.delta`."""
        tokens = torch.tensor(self.given["token_indices"], device=w0.device)
        change = (self.theta["rows"] - w0[tokens]) * self.weight
        return torch.zeros_like(w0).index_copy(0, tokens, change)

    def rows(self, w0: Tensor, which: Which) -> Tensor:
        """See `RowWise.rows`."""
        if isinstance(which, slice):
            which = torch.arange(which.start, which.start + w0.shape[0], device=w0.device)
        return self._change(w0, which, self.theta["rows"])

    def delta_at(self, w0: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightDelta.delta_at`: `w0` is (n, m)."""
        found = self._change(w0, rows, self.theta["rows"][:, columns]) * self.weight
        return found, found.abs()

    def _change(self, w0: Tensor, which: Tensor, trained: Tensor) -> Tensor:
        """`trained − w0` where the rows `which` are trained, else 0."""
        tokens, order = torch.tensor(self.given["token_indices"], device=w0.device).sort()
        place = torch.searchsorted(tokens, which).clamp(max=len(tokens) - 1)
        is_trained = (tokens[place] == which)[:, None]
        return torch.where(is_trained, trained[order[place]] - w0, 0.0)
