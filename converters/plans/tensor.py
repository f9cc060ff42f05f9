"""What will happen to one tensor of a merge."""

import math
from dataclasses import dataclass
from enum import Enum

from converters.files.header import FLOAT_DTYPES, INTEGER_DTYPES, TensorInfo, TensorSpec


class Action(str, Enum):
    """What a merge does to a tensor."""

    KEPT = "kept"  # the base's bytes, or its values in another dtype
    UPDATED = "updated"  # g(W0; θ)
    REPLACED = "replaced"  # from modules_to_save, in place of the base's
    ADDED = "added"  # new to the base: a head, or an untied output embedding


@dataclass(frozen=True)
class Part:
    """How a tensor that transformers fuses or splits corresponds to the weight of a module.

    Attributes:
        expert: the tensor is (a part of) this expert of the weight; None if the weight is a part of the tensor.
        rows: these rows of the expert are the tensor; or these rows of the tensor are the weight.
        height: rows of the tensor, for the latter.
    """

    expert: int | None
    rows: tuple[int, int]
    height: int = 0


@dataclass(frozen=True)
class Term:
    """One update of one tensor."""

    adapter: int  # which of the plan's adapters
    module: str  # whose θ applies
    transposed: bool  # the weight is stored as (in, out)
    parameter: str = "weight"  # of the module; or its bias
    beside: tuple[TensorInfo, ...] = ()  # weight and bias of the module, for a method that reads both together
    weight: TensorInfo | None = None  # of the module, for what its bias gets through it
    part: Part | None = None  # where transformers fuses or splits tensors


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output."""

    name: str
    action: Action
    dtype: str  # of the output, as safetensors spells it
    shape: tuple[int, ...]
    source: TensorInfo | None  # in the base: W0, or what is kept
    terms: tuple[Term, ...] = ()  # updates, to be summed
    saved: str | None = None  # tensor of the plan's head that is written here
    is_stack: bool = False  # of matrices, of experts, that are updated by rows

    @property
    def nbytes(self) -> int:
        """Size in the output."""
        if self.dtype in FLOAT_DTYPES:
            return math.prod(self.shape) * FLOAT_DTYPES[self.dtype].itemsize
        if self.source is not None:
            return self.source.nbytes
        itemsize = next(dtype.itemsize for dtype, name in INTEGER_DTYPES.items() if name == self.dtype)
        return math.prod(self.shape) * itemsize

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as a matrix: (rows, everything else), or, of a stack, the matrices below each other."""
        if self.is_stack:
            return math.prod(self.shape[:-1]), self.shape[-1]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def is_transposed(self) -> bool:
        """Whether the module it is the weight of has it as (out, in), and it is stored as (in, out)."""
        return bool(self.terms) and self.terms[0].transposed and self.terms[0].part is None

    @property
    def is_copy(self) -> bool:
        """Whether it is the base's bytes."""
        return self.source is not None and not self.terms and self.saved is None and self.source.dtype == self.dtype

    @property
    def is_untouched(self) -> bool:
        """Whether it is the base's tensor, under the same name."""
        return self.is_copy and self.source is not None and self.source.name == self.name

    @property
    def spec(self) -> TensorSpec:
        """The header entry of the output."""
        return TensorSpec(self.name, self.dtype, self.shape, self.nbytes)
