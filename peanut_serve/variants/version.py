"""A version of a variant: certain θ, or a certain merged checkpoint, held against the base and the running model."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from converters import Checkpoint, Plan, Weighted, __version__, load_adapter, open_checkpoint
from converters.errors import ConversionError, MissingScalingError
from converters.serving import (
    Pipeline,
    TensorInfo,
    TensorPlan,
    TensorReader,
    TensorSpec,
    Worker,
    as_lora,
    check_base,
    find_devices,
    plan_merge,
    sample_digests,
    tensor_blocks,
)
from peanut_serve.errors import VariantError
from peanut_serve.variants.host_weights import HostWeights

# of config.json: what does not change what the model computes
_NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


class VariantKind(str, Enum):
    """What a variant is made of."""

    BASE = "base"
    ADAPTER = "adapter"  # θ: merged into the base's weights
    CHECKPOINT = "checkpoint"  # weights that are merged already
    LORA = "lora"  # θ: served as LoRA beside the base's weights


@dataclass(frozen=True, eq=False)
class Version:
    """Weights that can be had.

    Attributes:
        digest: identity of the weights; of the base, θ and code where they are evaluated.
        kind: what they are made of.
        specs: the tensors that are not the base's.
        write: puts those tensors into host memory. Raises `PeanutError` where that fails.
    """

    digest: str
    kind: VariantKind
    specs: tuple[TensorSpec, ...] = ()
    write: Callable[[HostWeights], None] = lambda into: None

    @property
    def nbytes(self) -> int:
        """Of the tensors that are not the base's."""
        return sum(spec.nbytes for spec in self.specs)

    def evaluate(self) -> HostWeights:
        """The tensors that are not the base's, in host memory."""
        weights = HostWeights(self.digest[:16], self.specs)
        try:
            self.write(weights)
            return weights.seal()
        except BaseException:
            weights.close()
            raise


class LoadedModel:
    """What the engine loads: which tensors of the checkpoint, and which of them only together.

    Args:
        base: the checkpoint it was started from.
        groups: see `VariantWorker.peanut_learn`.
    """

    def __init__(self, base: Checkpoint, groups: Iterable[Sequence[str]]) -> None:
        self.base = base
        self._group_of: Mapping[str, tuple[str, ...]] = {name: tuple(group) for group in groups for name in group}

    def with_neighbours(self, names: Iterable[str]) -> list[str]:
        """These tensors and all that have to be loaded with them, layer by layer."""
        wanted = dict.fromkeys(other for name in names for other in self._group_of[name])
        return list(wanted)

    def all(self) -> list[str]:
        """Every tensor it loads, layer by layer."""
        return self.with_neighbours(self._group_of)

    def check(self, name: str, specs: Iterable[TensorSpec]) -> None:
        """Refuse tensors that the running model has no place for: vLLM would leave them out without a word.

        Raises `VariantError`.
        """
        for spec in specs:
            known = self.base.tensors.get(spec.name)
            if spec.name not in self._group_of or known is None:
                raise VariantError(
                    f"{name} changes {spec.name}, which the running model does not load (a tied embedding, or "
                    "another architecture); merge it, and serve the merged folder by a vLLM of its own"
                )
            if known.shape != spec.shape:
                raise VariantError(
                    f"{name}: {spec.name} has shape {spec.shape}, the running model's has {known.shape}; "
                    "serve it by a vLLM of its own"
                )


@dataclass(frozen=True)
class _EvaluateJob:
    """Evaluate one tensor; see `converters.pipeline.Job`."""

    plan: Plan
    tensor: TensorPlan
    into: HostWeights
    is_finished: bool = False

    @property
    def source(self) -> TensorInfo | None:
        """What it reads."""
        return self.tensor.source

    def run(self, worker: Worker) -> None:
        """Evaluate and keep it."""
        for block in tensor_blocks(self.plan, self.tensor, worker):
            self.into.put(self.tensor.name, block)


# whether vLLM was started with room for a LoRA adapter: its rank, and last parts of the names of its modules
FitsLora = Callable[[int, frozenset[str]], bool]


def adapter_version(
    name: str, source: Path | str, model: LoadedModel, device: str, fits_lora: FitsLora | None
) -> Version:
    """A version of θ. Reads θ, not the base.

    Args:
        name: of the variant, for messages.
        source: folder, weights file or Hub id.
        model: the running model.
        device: where f is evaluated.
        fits_lora: it is served as LoRA if that says exactly what it does, and vLLM has room for it; None for never.

    Raises `PeanutError`: broken, of another base, or nothing that the running model has a place for.
    """
    try:
        adapter = load_adapter(source)
    except MissingScalingError as error:
        raise VariantError(f"{error}; to serve it, convert it once: peanut-merge --format peft --scaling S") from None
    base = model.base
    check_base(base, adapter, force=False)
    plan = plan_merge(base, [Weighted(adapter)])
    if fits_lora is not None and _is_lora(plan, fits_lora):
        return Version(_digest_of("lora", adapter.digest, base.fingerprint), VariantKind.LORA)
    changed = [tensor for tensor in plan.tensors if not tensor.is_untouched]
    model.check(name, [tensor.spec for tensor in changed])

    def write(into: HostWeights) -> None:
        base.check_unchanged()
        jobs = [_EvaluateJob(plan, tensor, into) for tensor in changed]
        Pipeline(find_devices(device)).run(jobs)
        base.check_unchanged()

    digest = _digest_of("merged", adapter.digest, base.fingerprint)
    return Version(digest, VariantKind.ADAPTER, tuple(tensor.spec for tensor in changed), write)


def _is_lora(plan: Plan, fits: FitsLora) -> bool:
    try:
        converted = as_lora(plan, plan.base.folder)
    except ConversionError:
        return False
    kinds = frozenset(module.rsplit(".", 1)[-1] for module in converted.modules)
    return converted.max_lora_rank is not None and fits(converted.r, kinds)


def checkpoint_version(name: str, folder: Path, model: LoadedModel) -> Version:
    """A version of a merged checkpoint: its tensors are held against the base's, byte by byte.

    Raises `PeanutError`: broken, or another architecture.
    """
    merged, base = open_checkpoint(folder), model.base
    if missing := sorted(set(base.tensors) - set(merged.tensors)):
        raise VariantError(f"{name}: {missing[0]} of the base is not in {folder}; is it a merge of this base?")
    own, wanted = (_architecture(checkpoint.config) for checkpoint in (merged, base))
    if odd := sorted(key for key in own.keys() | wanted.keys() if own.get(key) != wanted.get(key)):
        raise VariantError(
            f"{name}: its config says {odd[0]} {own.get(odd[0])}, the running model's {wanted.get(odd[0])}; "
            "serve it by a vLLM of its own"
        )
    with TensorReader() as reader:
        changed = [info for info in merged.tensors.values() if _differs(info, base.tensors.get(info.name), reader)]
        hashes = {info.name: reader.hash(info) for info in changed}
    model.check(name, specs := tuple(TensorSpec(i.name, i.dtype, i.shape, i.nbytes) for i in changed))

    def write(into: HostWeights) -> None:
        merged.check_unchanged()
        with TensorReader() as reader:
            for info in changed:
                for chunk in reader.chunks(info):
                    into.put(info.name, chunk)
        merged.check_unchanged()

    return Version(
        _digest_of("checkpoint", json.dumps(hashes), base.fingerprint), VariantKind.CHECKPOINT, specs, write
    )


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE and value is not None}


def base_version(base: Checkpoint) -> Version:
    """The base itself."""
    return Version(_digest_of("base", base.fingerprint), VariantKind.BASE)


def _differs(info: TensorInfo, other: TensorInfo | None, reader: TensorReader) -> bool:
    if other is None or (info.dtype, info.shape) != (other.dtype, other.shape):
        return True
    if sample_digests([info]) != sample_digests([other]):
        return True
    return reader.hash(info) != reader.hash(other)


def _digest_of(*facts: str) -> str:
    return hashlib.sha256(json.dumps([__version__, *facts]).encode()).hexdigest()[:40]


def host_copy(base: Checkpoint, names: Iterable[str]) -> HostWeights:
    """Tensors of the base in host memory, as they are on the disk."""
    infos = [base.tensors[name] for name in names]
    weights = HostWeights("base", [TensorSpec(i.name, i.dtype, i.shape, i.nbytes) for i in infos])
    try:
        base.check_unchanged()
        with TensorReader() as reader:
            for info in infos:
                for chunk in reader.chunks(info):
                    weights.put(info.name, chunk)
        base.check_unchanged()
        return weights.seal()
    except BaseException:
        weights.close()
        raise


def places_of(
    names: Iterable[str], weights: HostWeights | None, base: Mapping[str, TensorInfo]
) -> Iterator[TensorInfo]:
    """Where each tensor of a version lies: among its own, else the base's."""
    own = weights.tensors if weights is not None else {}
    return (own.get(name) or base[name] for name in names)
