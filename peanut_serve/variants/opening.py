"""Opening versions: an adapter or a merged checkpoint, checked against the base and the running model."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from converters import Plan, Weighted, load_adapter, open_checkpoint
from converters.errors import MissingScalingError, PeanutError
from converters.serving import (
    Pipeline,
    TensorInfo,
    TensorPlan,
    TensorReader,
    TensorSpec,
    ThetaStore,
    Worker,
    check_base,
    describe_changes,
    find_adapter,
    find_devices,
    plan_merge,
    sample_digests,
    tensor_blocks,
)
from peanut_serve.errors import VariantError
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.lora_export import LoraLimits, lora_export, lora_refusal
from peanut_serve.variants.on_device.factors import FactorsJob, factored_tensors
from peanut_serve.variants.state_folder import VariantStore
from peanut_serve.variants.version import LoadedModel, VariantKind, Version, digest_of

logger = logging.getLogger("vllm.peanut_serve")

_ROOM = 256 << 20  # for files beside θ, such as tokenizers
_USE_MERGED = "serve it with --mode merged or auto"

# keys of config.json that do not change what the model computes
_NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


@dataclass(frozen=True, eq=False)
class VersionOpener:
    """Opens versions for one running model.

    Attributes:
        model: the running model.
        device: where f is evaluated.
        lora: what vLLM allows as LoRA; None if adapters are always merged.
        merges: whether weights can be merged into the engine; if not, everything has to be LoRA.
        keeps_base: whether the workers keep W0, so that exact factors suffice.
    """

    model: LoadedModel
    device: str
    lora: LoraLimits | None = None
    merges: bool = True
    keeps_base: bool = False

    def adapter(self, name: str, source: Path | str) -> Version:
        """Open a version of an adapter; see `adapter_version`."""
        return adapter_version(name, source, self)

    def checkpoint(self, name: str, folder: Path) -> Version:
        """Open a version of a merged checkpoint; see `checkpoint_version`."""
        if not self.merges:
            raise VariantError(f"{name} is a merged model, which --mode lora does not serve; {_USE_MERGED}")
        return checkpoint_version(name, folder, self.model)

    def keep_adapter(self, name: str, source: Path, store: VariantStore) -> Version:
        """Copy θ into a store and open the copy.

        Raises the same errors as `adapter_version`; nothing is kept then.
        """
        self._check_size(name, source)
        copy = store.copy_theta(source)
        try:
            version, theta = _open_adapter(name, copy, self)
        except BaseException:
            store.discard(copy)
            raise
        with store.keeping:
            if (earlier := self.reopen_adapter(name, version.digest, store)) is not None:
                store.discard(copy)  # it has the same θ for another name, perhaps in another layout, with other keys
                return earlier
            store.keep(copy, version.digest)
        kept = store.theta(version.digest)
        if kept is None:
            raise VariantError(f"the copy of {name} was removed while it was opened; try again")
        return version if theta.move_to(kept) else self.adapter(name, kept)

    def _check_size(self, name: str, source: Path) -> None:
        """Refuse files that cannot be θ: copying and hashing them would fill the disk, and hold up other variants."""
        files = [path for path in source.iterdir() if path.is_file()] if source.is_dir() else [source]
        size = sum(path.stat().st_size for path in files)
        most = _ROOM + 2 * sum(info.nbytes for info in self.model.base.tensors.values())
        if size > most:
            raise VariantError(
                f"the files of {name} have {size >> 20} MiB, expected at most {most >> 20} MiB for an adapter of the "
                "base; remove what does not belong to it"
            )

    def reopen_adapter(self, name: str, digest: str, store: VariantStore) -> Version | None:
        """Open the version that a store keeps under a digest. None if there is none, or if it is damaged."""
        kept = store.theta(digest)
        if kept is None:
            return None
        try:
            version = self.adapter(name, kept)
        except (PeanutError, OSError) as error:
            logger.warning("the kept copy of %s cannot be used: %s", name, error)
            return None
        if version.digest != digest:
            logger.warning("the kept copy of %s is damaged: its digest is %s", name, version.digest[:12])
            return None
        return version


class _MovableTheta:
    """The tensors of an opened adapter whose files may move: it is opened as a new copy, and read where that is kept.

    Nothing else in an opened adapter depends on the location of its files.
    """

    def __init__(self, store: ThetaStore) -> None:
        self.shapes, self.dtypes = store.shapes, store.dtypes
        self._store = store

    def move_to(self, path: Path) -> bool:
        """Read the tensors from `path` from now on; False if finding them there requires the adapter's layout."""
        try:
            store = find_adapter(str(path)).store
        except PeanutError:
            return False
        if (store.shapes, store.dtypes) != (self.shapes, self.dtypes):
            return False
        self._store = store
        return True

    def tensor(self, key: str) -> Tensor:
        """See `ThetaStore`."""
        return self._store.tensor(key)

    def blocks(self, key: str) -> Iterator[Tensor]:
        """See `ThetaStore`."""
        return self._store.blocks(key)

    def check_unchanged(self) -> None:
        """See `ThetaStore`."""
        self._store.check_unchanged()


@dataclass(frozen=True)
class _EvaluateJob:
    """Evaluates one tensor; see `converters.evaluation.pool.Job`."""

    plan: Plan
    tensor: TensorPlan
    into: HostWeights
    is_finished: bool = False

    @property
    def source(self) -> TensorInfo | None:
        """The tensor of the base that it reads."""
        return self.tensor.source

    def run(self, worker: Worker) -> None:
        """Evaluate the tensor into host memory."""
        for block in tensor_blocks(self.plan, self.tensor, worker):
            self.into.put(self.tensor.name, block)


def adapter_version(name: str, source: Path | str, opener: VersionOpener) -> Version:
    """Open a version of an adapter. Reads θ, but only the headers of the base.

    Args:
        name: of the variant, for messages.
        source: folder, weights file or Hub id.
        opener: the running model, and how it serves adapters.

    Raises `PeanutError` if the adapter is damaged, was trained on another base, changes tensors that the running
    model does not have, or is neither LoRA nor may be merged.
    """
    return _open_adapter(name, source, opener)[0]


def _open_adapter(name: str, source: Path | str, opener: VersionOpener) -> tuple[Version, _MovableTheta]:
    try:
        adapter = load_adapter(source)
    except MissingScalingError as error:
        raise VariantError(
            f"{error}; to serve this adapter, convert it once with peanut-merge --format peft --scaling S"
        ) from None
    theta, base = _MovableTheta(adapter.store), opener.model.base
    adapter = replace(adapter, store=theta)
    check_base(base, adapter, force=False)
    plan = plan_merge(base, [Weighted(adapter)])
    if plan.base.original is not None:
        raise VariantError(
            f"{name} was trained on a base whose {describe_changes(plan.base)} before the training, so it does not "
            "fit the model in the engine; merge it with peanut-merge, and serve the result as a base of its own"
        )
    if opener.lora is not None:
        refusal = lora_refusal(plan, opener.lora)
        if refusal is None:
            export = lora_export(name, adapter, base, opener.lora.dtype, opener.device)
            digest = digest_of("lora", adapter.digest, base.fingerprint)
            return Version(digest, VariantKind.LORA, lora=export), theta
        if not opener.merges:
            raise VariantError(f"{name}: {refusal}; {_USE_MERGED}")
    changed = [tensor for tensor in plan.tensors if not tensor.is_untouched]
    opener.model.check(name, [tensor.spec for tensor in changed])
    factored = factored_tensors(plan, changed) if opener.keeps_base else {}

    def write(into: HostWeights) -> None:
        """Evaluate the tensors that the adapter changes, or their factors."""
        base.check_unchanged()
        jobs: list[FactorsJob | _EvaluateJob] = [
            FactorsJob(plan, tensor, factored[tensor.name], into)
            if tensor.name in factored
            else _EvaluateJob(plan, tensor, into)
            for tensor in changed
        ]
        Pipeline(find_devices(opener.device)).run(jobs)
        base.check_unchanged()

    digest = digest_of("merged", adapter.digest, base.fingerprint)
    specs = tuple(tensor.spec for tensor in changed)
    return Version(digest, VariantKind.ADAPTER, specs, write, factored=factored), theta


def checkpoint_version(name: str, folder: Path, model: LoadedModel) -> Version:
    """Open a version of a merged checkpoint. Every tensor is compared with the base's, byte by byte.

    Raises `PeanutError` if the checkpoint is damaged or has another architecture.
    """
    merged, base = open_checkpoint(folder), model.base
    if missing := sorted(set(base.tensors) - set(merged.tensors)):
        raise VariantError(
            f"{name}: {folder} does not have the base's tensor {missing[0]}; check that it was merged from this base"
        )
    own, expected = (_architecture(checkpoint.config) for checkpoint in (merged, base))
    if differing := sorted(key for key in own.keys() | expected.keys() if own.get(key) != expected.get(key)):
        key = differing[0]
        raise VariantError(
            f"{name}: {key} is {own.get(key)} in its config, but {expected.get(key)} in the running model's; "
            "serve it with a separate vLLM server"
        )
    with TensorReader() as reader:
        changed = [info for info in merged.tensors.values() if _differs(info, base.tensors.get(info.name), reader)]
        hashes = {info.name: reader.hash(info) for info in changed}
    model.check(name, specs := tuple(TensorSpec(i.name, i.dtype, i.shape, i.nbytes) for i in changed))

    def write(into: HostWeights) -> None:
        """Copy the tensors that differ from the base's."""
        merged.check_unchanged()
        with TensorReader() as reader:
            for info in changed:
                for chunk in reader.chunks(info):
                    into.put(info.name, chunk)
        merged.check_unchanged()

    digest = digest_of("checkpoint", json.dumps(hashes), base.fingerprint)
    return Version(digest, VariantKind.CHECKPOINT, specs, write)


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE and value is not None}


def _differs(info: TensorInfo, other: TensorInfo | None, reader: TensorReader) -> bool:
    if other is None or (info.dtype, info.shape) != (other.dtype, other.shape):
        return True
    if sample_digests([info]) != sample_digests([other]):
        return True
    return reader.hash(info) != reader.hash(other)
