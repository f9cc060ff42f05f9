"""The Method seam: θ of one module under one formula, and what it does to one weight.

A method is one file in this folder, one row in `table.py` and one test file. It says what it reads of W0, what it
adds to it (`delta`: the definition, the oracle of the verification and the fallback), and how to evaluate that block
by block where it saves memory (`update`). Weights are (out, in), as `torch.nn.Linear` stores them; a method that can
do better than to transpose the whole weight overrides `transposed`. Nothing outside this folder knows a formula.
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from converters.methods.peft_form import PeftForm
from converters.methods.weight_delta import WeightDelta


class Method(WeightDelta):
    """θ of one module as it was trained: a delta that can be opened, described and identified.

    Attributes:
        name: of the method.
        formula: what it computes, in Markdown, for model cards.
        peft: how HF PEFT saves θ; None for a method that is read by layouts of its own.
        integers: parts of θ that are indices.
        lora_rank: the rank of its exact LoRA form, as a formula; None where it never has one.
        reads_module: it needs the weight and the bias of its module together, see `on_module`.
        packages: other than torch, whose versions its results depend on; manifests record them.
        changes_weight: whether θ changes the weight; else the bias alone, and the method is the delta of that.
        remark: what its users have to know, a sentence or two, for the documentation.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    peft: ClassVar[PeftForm | None] = None
    integers: ClassVar[frozenset[str]] = frozenset()
    lora_rank: ClassVar[str | None] = None
    reads_module: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    changes_weight: ClassVar[bool] = True
    remark: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Method":
        """From the tensors of θ by name, and everything else that the formula needs.

        The tensors may lie on the meta device: that is how an adapter is checked before θ is read.

        Raises `ThetaError` when their shapes do not fit each other.
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the formula needs besides θ, as JSON values."""

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Method":
        """The same formula and settings with other tensors."""
        return self.from_parts(parts, self.settings)

    @property
    def kind(self) -> str:
        """See `WeightDelta.kind`."""
        shapes = {name: list(part.shape) for name, part in self.parts.items()}
        return json.dumps([self.name, self.settings, shapes])

    @property
    def bias(self) -> WeightDelta | None:
        """What is added to the module's bias, as a matrix (out, 1); None for nothing."""
        return None

    def on_module(self, weight: Tensor, bias: Tensor | None) -> "Method":
        """The same for one module of a base, where `reads_module` is set: called before the delta is asked for.

        Args:
            weight: (out, in), in the dtype of the base.
            bias: (out,); None where the module has none.
        """
        return self

    @classmethod
    def settings_of_base(cls, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """Settings that follow from the base alone, given (out, in) of every weight that the method adapts."""
        return {}

    @property
    def bias_from_weight(self) -> Tensor | None:
        """C, (in, 1): `W0 · C` is added to the module's bias as well, beside `bias`; None for nothing."""
        return None

    @property
    def needs_bias(self) -> bool:
        """Whether θ adds to the module's bias, so that the module has to have one."""
        return False

    @property
    def keeps_ties(self) -> bool:
        """Whether a tensor that is tied to the weight stays tied, and changes with it."""
        return False

    @property
    def digest_facts(self) -> list[Any]:
        """What the digest of an adapter covers besides θ, as JSON values."""
        return [self.name, self.settings]

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest, the model card and `peanut-inspect` show of one module."""
        return {"method": self.name, **({} if self.rank is None else {"r": self.rank}), **self.settings}

    @classmethod
    def describe(cls, modules: Sequence["Method"]) -> dict[str, Any]:
        """The facts of several modules: a value, or a list where it is not the same for all."""
        keys = dict.fromkeys(key for one in modules for key in one.facts)
        return {key: one_or_many(one.facts.get(key) for one in modules) for key in keys}


def one_or_many(values: Iterable[Any]) -> Any:
    """The only value there is, or a sorted list of all."""
    found = sorted(set(values), key=lambda value: (value is None, value))
    return found[0] if len(found) == 1 else found
