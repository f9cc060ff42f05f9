"""A version of a variant: specific weights, identified by a digest; and the tensors that the running model loads."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from converters import Checkpoint
from converters.serving import TensorSpec
from peanut_serve.errors import VariantError
from peanut_serve.variants.host_weights import HostWeights, stored
from peanut_serve.variants.lora_export import LoraExport
from peanut_serve.variants.on_device.places import Factored, Place

# The first version of this package with the results of this one. To be set to the next version when what an adapter
# is evaluated to changes, even in the last bits: names can then not be rolled back to versions from before.
# tests/variants/test_evaluation_version.py compares the results of all methods with recorded ones.
EVALUATION = "0.1.0"


class VariantKind(str, Enum):
    """How a variant is stored, and how it is served."""

    BASE = "base"
    ADAPTER = "adapter"  # θ: merged into the base's weights
    CHECKPOINT = "checkpoint"  # already merged weights
    LORA = "lora"  # θ: served as LoRA on top of the base's weights


@dataclass(frozen=True, eq=False)
class Version:
    """Weights that the engine can swap to.

    Attributes:
        digest: identity of the weights; for an adapter, it depends on the base, θ and `EVALUATION`.
        kind: where the weights come from.
        specs: the tensors that differ from the base's.
        write: writes those tensors, or their factors, to host memory. Raises `PeanutError` on failure.
        lora: how to write it as a LoRA adapter, if it is served as one.
        factored: those of the tensors that are written as their exact factors, for workers that keep W0.
    """

    digest: str
    kind: VariantKind
    specs: tuple[TensorSpec, ...] = ()
    write: Callable[[HostWeights], None] = lambda into: None
    lora: LoraExport | None = None
    factored: Mapping[str, Factored] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of what is written to host memory."""
        return sum(spec.nbytes for spec in stored(self.specs, self.factored))

    @property
    def has_own_weights(self) -> bool:
        """Whether it runs on weights other than the base's."""
        return self.kind in (VariantKind.ADAPTER, VariantKind.CHECKPOINT)

    def evaluate(self) -> HostWeights:
        """Write the tensors that differ from the base's, or their factors, to new host memory."""
        weights = HostWeights(self.digest[:16], self.specs, self.factored)
        try:
            self.write(weights)
            return weights.seal()
        except BaseException:
            weights.close()
            raise


class LoadedModel:
    """Which tensors of the checkpoint the engine loads, and which of them must be loaded together.

    Args:
        base: the checkpoint that the engine was started from.
        groups: see `VariantWorker.peanut_learn`.
    """

    def __init__(self, base: Checkpoint, groups: Iterable[Sequence[str]]) -> None:
        self.base = base
        self._group_of: Mapping[str, tuple[str, ...]] = {name: tuple(group) for group in groups for name in group}

    def with_neighbours(self, names: Iterable[str]) -> list[str]:
        """These tensors and all that must be loaded with them, layer by layer."""
        return list(dict.fromkeys(other for name in names for other in self._group_of[name]))

    def all(self) -> list[str]:
        """Every tensor that the engine loads, layer by layer."""
        return self.with_neighbours(self._group_of)

    def check(self, name: str, specs: Iterable[TensorSpec]) -> None:
        """Reject tensors that the running model does not have: vLLM would skip them silently.

        Raises `VariantError`.
        """
        for spec in specs:
            known = self.base.tensors.get(spec.name)
            if spec.name not in self._group_of or known is None:
                raise VariantError(
                    f"{name} changes {spec.name}, which the running model does not load (a tied embedding, or "
                    "another architecture); merge it, and serve the merged folder with a separate vLLM server"
                )
            if known.shape != spec.shape:
                raise VariantError(
                    f"{name}: {spec.name} has shape {spec.shape}, expected the running model's {known.shape}; "
                    "serve it with a separate vLLM server"
                )


def base_version(base: Checkpoint) -> Version:
    """The version of the base itself."""
    return Version(digest_of("base", base.fingerprint), VariantKind.BASE)


def digest_of(*facts: str) -> str:
    """Identity of weights that depend on these facts, and on how this package evaluates them."""
    return hashlib.sha256(json.dumps([EVALUATION, *facts]).encode()).hexdigest()[:40]


def places_of(names: Iterable[str], weights: HostWeights | None, base: Mapping[str, Place]) -> Iterator[Place]:
    """Where workers get each tensor of a version: in its own weights if these include it, otherwise in the base's."""
    own = weights.places if weights is not None else {}
    return (own.get(name) or base[name] for name in names)
