"""A trained adapter: θ per module, what it replaces whole, and where it came from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.errors import ThetaError
from converters.finite import all_finite
from converters.targeting import Targeting
from converters.theta_store import ThetaStore
from converters.tweaker import Orientation, Tweaker


@dataclass(frozen=True)
class ModuleTheta:
    """Where θ of one module lies in the store, and what the config says of it."""

    orientation: Orientation
    a: str
    b: str
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    r: int
    size: int  # d of the tweaker: `out` for columns, `in` for rows
    act_fn: str
    scaling: float

    @property
    def depth(self) -> int:
        """Pairs of hidden layers."""
        return len(self.encoders)

    @property
    def keys(self) -> tuple[str, ...]:
        """All its keys in the store."""
        return (self.a, self.b, *self.encoders, *self.decoders)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An opened adapter. Nothing of θ is held in memory; `tweaker` reads one module.

    Attributes:
        folder: where it lies.
        layout: the on-disk convention, `evidence` what told it.
        modules: module name, as the training saw it -> θ.
        saved: tensor name of a `modules_to_save` module, as the training saw it -> key in the store.
        targeting: what the config says is adapted, if the layout says it.
        digest: SHA-256 of θ and everything of the config that the mathematics needs.
        base_name, base_revision: what it was trained on, as recorded by the training.
        task_type: PEFT's task type (CAUSAL_LM, SEQ_CLS, ...).
        model_class: class of transformers that was trained, if recorded.
        base_fingerprint: identity of the base, where someone recorded it (see `record_base`).
    """

    folder: Path
    layout: str
    evidence: str
    store: ThetaStore
    modules: Mapping[str, ModuleTheta]
    saved: Mapping[str, str]
    targeting: Targeting | None
    digest: str
    base_name: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    model_class: str | None = None
    base_fingerprint: str | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def parameter_count(self) -> int:
        """Numbers in θ, without `modules_to_save`."""
        return sum(count(self.store.shapes[key]) for theta in self.modules.values() for key in theta.keys)

    def tweaker(self, module: str) -> Tweaker:
        """θ of one module. Raises `ThetaError` if its tensors do not fit each other."""
        theta = self.modules[module]
        return Tweaker(
            theta.orientation,
            self.store.tensor(theta.a),
            self.store.tensor(theta.b),
            tuple(self.store.tensor(key) for key in theta.encoders),
            tuple(self.store.tensor(key) for key in theta.decoders),
            theta.act_fn,
            theta.scaling,
        )

    def saved_tensor(self, name: str) -> Tensor:
        """One tensor of `modules_to_save`."""
        return self.store.tensor(self.saved[name])


def count(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    return int(torch.Size(shape).numel())


def digest_of(store: ThetaStore, names: Mapping[str, str], facts: Mapping[str, object]) -> str:
    """SHA-256 over `facts` and the tensors, each under the layout-free name `names` gives its key.

    Raises:
        ThetaError: a tensor is not floating, or holds NaN or Inf.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key in sorted(names, key=lambda key: names[key]):
        tensor = store.tensor(key)
        if not tensor.is_floating_point():
            raise ThetaError(f"{key} is {tensor.dtype}; wanted floating-point θ")
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ThetaError(f"{key} holds {bad} NaN or Inf of {tensor.numel()} numbers; the training diverged")
        digest.update(json.dumps([names[key], str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
