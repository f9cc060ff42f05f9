"""A trained adapter: θ per module, the tensors it replaces, and where it came from."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.adapters.store import ThetaStore
from converters.adapters.targeting import Targeting
from converters.errors import ThetaError
from converters.methods.base import Method
from converters.methods.finite import ON_THIS_THREAD, all_finite
from converters.methods.lora.expert_lora import ExpertLora
from converters.methods.peanut.tweaker import Tweaker
from converters.methods.stored import INDEX_DTYPES
from converters.methods.weight_delta import WeightShape


@dataclass(frozen=True)
class ModuleTheta:
    """Where θ of one module is in the store, and what the layout says about it.

    Attributes:
        method: the formula that θ is for.
        parts: part of θ, as the method calls it -> key in the store.
        settings: everything else that the formula needs.
        fan_in_fan_out: the config says that the weight is stored as (in, out).
    """

    method: type[Method]
    parts: Mapping[str, str]
    settings: Mapping[str, Any]
    fan_in_fan_out: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """An opened adapter. Nothing of θ is held in memory; `method` reads one module.

    Attributes:
        path: the folder or file it was read from.
        layout, evidence: the on-disk convention, and what identified it.
        modules: module name, in the naming of the training -> where its θ is.
        saved: tensor that the adapter replaces as a whole (modules_to_save, heads, biases) -> key in the store.
        embedded: base weight that was saved with the adapter -> key in the store.
        targeting: which modules must have θ, as far as that is known.
        digest: SHA-256 of θ and everything that the mathematics needs.
        target_parameters: parameters that are adapted without their module, as PEFT's config names them; their θ is
            under the module that has them, with `.base_layer` for each wrapper around their own.
        layer_replication: (start, end) of the layers of its base that it was trained on a stack of, as PEFT's config
            has them; empty for the base as it is.
        rival: another layout that the weights could be in as well; the shapes of a base decide.
        labels: class labels of its head, if recorded.
        repo_id, revision: where on the Hub it came from, if it did.
        base_name, base_revision: what it was trained on, as recorded by the training.
        task_type: PEFT's task type (CAUSAL_LM, SEQ_CLS, ...), or IMAGE_CLS.
        model_class: class of transformers that was trained, if recorded.
        base_fingerprint: identity of the base, if it was recorded (see `record_base`).
        notes: for the user, of what was found in its config.
    """

    path: Path
    layout: str
    evidence: str
    store: ThetaStore
    modules: Mapping[str, ModuleTheta]
    saved: Mapping[str, str]
    digest: str
    embedded: Mapping[str, str] = field(default_factory=dict)
    targeting: Targeting | None = None
    target_parameters: tuple[str, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    rival: str | None = None
    labels: tuple[str, ...] | None = None
    repo_id: str | None = None
    revision: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    model_class: str | None = None
    base_fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that contains it."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def name(self) -> str:
        """Short name: of the folder, of the file without its ending, or the last part of the Hub id."""
        if self.repo_id is not None:
            return self.repo_id.rsplit("/", 1)[-1]
        path = self.path.resolve()
        return path.name if path.is_dir() else path.stem

    @property
    def parameter_count(self) -> int:
        """Number of values in θ, without tensors that are replaced as a whole."""
        keys = {key for theta in self.modules.values() for key in theta.parts.values()}  # modules may share some
        return sum(count(self.store.shapes[key]) for key in keys)

    def describe(self, module: str) -> Method:
        """θ of one module on the meta device: its shapes, settings and facts, without its numbers."""
        return self._descriptions[module]

    def is_parameter(self, module: str) -> bool:
        """Whether it is one of `target_parameters`."""
        return self.modules[module].method is ExpertLora

    def rank(self, module: str) -> int | None:
        """The rank of the exact factors of one module's delta, or of one expert's; None if it has none."""
        described = self.describe(module)
        return described.expert_rank if isinstance(described, ExpertLora) else described.rank

    def weight_shape(self, module: str) -> WeightShape:
        """(out, in) of the weight that θ of `module` was trained for, as far as θ says."""
        return self.describe(module).weight_shape

    def method(self, module: str) -> Method:
        """θ of one module. The last few of several experts are kept: a base may store each expert by itself."""
        return self._recent(module) if self.is_parameter(module) else self._read(module)

    def tweaker(self, module: str) -> Tweaker:
        """θ of one module of a PEANuT or LoRA adapter. Raises `ThetaError` for another method."""
        found = self.method(module)
        if not isinstance(found, Tweaker):
            raise ThetaError(f"{self.path}: {module} is adapted by {found.name}, not by PEANuT or LoRA")
        return found

    def _read(self, module: str) -> Method:
        theta = self.modules[module]
        return theta.method.from_parts(
            {part: self.store.tensor(key) for part, key in theta.parts.items()}, theta.settings
        )

    @cached_property
    def _recent(self) -> Callable[[str], Method]:
        return lru_cache(maxsize=4)(self._read)

    @cached_property
    def _descriptions(self) -> dict[str, Method]:
        return {module: _describe(self.store, module, theta) for module, theta in self.modules.items()}

    def saved_tensor(self, name: str) -> Tensor:
        """One tensor that the adapter replaces as a whole."""
        return self.store.tensor(self.saved[name])

    def saved_blocks(self, name: str) -> Iterator[Tensor]:
        """`saved_tensor` in blocks of rows."""
        return self.store.blocks(self.saved[name])


@dataclass(frozen=True, eq=False)
class Weighted:
    """An adapter among several: its delta weights are multiplied by `weight` and summed with the others'."""

    adapter: Adapter
    weight: float = 1.0


def count(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    return int(torch.Size(shape).numel())


def is_counter(tensor: str) -> bool:
    """Whether a tensor is the counter of a batch norm, an integer that no output depends on."""
    return tensor.rpartition(".")[2] == "num_batches_tracked"


def _describe(store: ThetaStore, module: str, theta: ModuleTheta) -> Method:
    """θ of one module on the meta device. Raises `ThetaError` when its shapes do not fit each other."""
    parts = {
        part: torch.empty(store.shapes[key], dtype=store.dtypes[key], device="meta")
        for part, key in theta.parts.items()
    }
    try:
        return theta.method.from_parts(parts, theta.settings)
    except ThetaError as error:
        raise ThetaError(f"{module}: {error}") from None


def check_theta(store: ThetaStore, modules: Mapping[str, ModuleTheta], saved: Mapping[str, str]) -> str:
    """Check the shapes and values of θ of every module; returns the digest.

    The digest is a SHA-256 of every tensor, under a name that does not depend on the layout, and of every setting
    that the formula needs.

    Raises:
        ThetaError: shapes do not fit each other; a tensor is not floating-point, or contains NaN or Inf.
    """
    names = {key: f"saved {name}" for name, key in saved.items()}
    counted = {key for name, key in saved.items() if is_counter(name) and store.dtypes[key] in INDEX_DTYPES}
    facts, integers = {}, set(counted)
    for module, theta in modules.items():
        names |= {key: f"{module} {part}" for part, key in theta.parts.items()}
        integers |= {theta.parts[part] for part in theta.method.integers & theta.parts.keys()}
        facts[module] = [*_describe(store, module, theta).digest_facts, theta.fan_in_fan_out]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key in sorted(names, key=lambda key: names[key]):
        dtype, shape = store.dtypes[key], store.shapes[key]
        if not (dtype in INDEX_DTYPES if key in integers else dtype.is_floating_point):
            raise ThetaError(f"{key} is {dtype}; expected {'indices' if key in integers else 'floating-point θ'}")
        digest.update(json.dumps([names[key], str(dtype), list(shape)]).encode())
        bad = 0
        for block in store.blocks(key):
            # its tensors are small: to wake other threads for each takes longer than to look at it
            bad += 0 if all_finite(block, ON_THIS_THREAD) else int((~torch.isfinite(block)).sum())
            digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if bad:
            raise ThetaError(f"{key} contains {bad} NaN or Inf values out of {count(shape)}; the training diverged")
    return digest.hexdigest()
