"""Swaps weights in every vLLM worker: `--worker-extension-cls` mixes `VariantWorker` into the worker.

Weights are passed as places, because vLLM's `collective_rpc` cannot send tensors: in files, or in the worker's own
copy of W0 with the factors of an update. They are loaded by vLLM's own layerwise reload
(`vllm/model_executor/model_loader/reload`), under their names in the checkpoint, so that vLLM fuses, shards, pads and
repacks them as usual.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.model_loader.reload import layerwise

from converters.errors import PeanutError
from converters.serving import TensorInfo, TensorReader
from peanut_serve.settings.server import ServerSettings
from peanut_serve.variants.on_device.places import KeptTensor, Place, UpdatedTensor, decode_places
from peanut_serve.vllm_plugin.swap.boxes import BoxRecorder
from peanut_serve.vllm_plugin.swap.kept import KeptWeights, KeptWeightsError
from peanut_serve.vllm_plugin.swap.mapping import StagedFactors, source
from peanut_serve.vllm_plugin.swap.packed import PackedLayers
from peanut_serve.vllm_plugin.swap.storages import NamedStorages

logger = logging.getLogger("vllm.peanut_serve")


class ReloadError(PeanutError):
    """vLLM did not load all tensors."""


class VariantWorker:
    """RPC methods; `self` is vLLM's worker.

    Attributes:
        peanut_kept: copies of W0, if `peanut_learn` was called for them.
        peanut_staging: factors on the device.
        peanut_packed: layers as vLLM's CPU backend packed them.
    """

    model_runner: Any
    reload_weights: Callable[..., None]
    peanut_kept: KeptWeights
    peanut_staging: StagedFactors
    peanut_packed: PackedLayers

    def peanut_apply(self, places: str, afresh: bool = False) -> float:
        """Load tensors into the model; returns the seconds taken. After a failure, all tensors must be loaded again.

        Args:
            places: see `encode_places`. All tensors of every changed layer must be included.
            afresh: use nothing that was kept of earlier loads, as after a failure.

        Raises `ReloadError` if vLLM did not load all of them, and `KeptWeightsError` if the worker keeps no copy of a
        W0 that is needed, or if what it makes of it is not finite.
        """
        start = time.perf_counter()
        packed = self._peanut_packed_layers()
        if afresh:
            packed.clear()
        try:
            self._peanut_load(packed.exchange(decode_places(places)), packed)
        except BaseException:
            packed.clear()
            raise
        return time.perf_counter() - start

    def _peanut_load(self, wanted: Sequence[Place], packed: PackedLayers) -> None:
        """Load tensors through vLLM, with none too, so that it drops what it derived from other weights."""
        taken, layers, current = 0, dict[str, set[int]](), NamedStorages()

        def weights() -> Iterator[tuple[str, Tensor]]:
            """Those that are wanted, read when vLLM takes them."""
            nonlocal taken
            with self._peanut_reading(wanted) as read:
                for place in wanted:
                    current.latest = place.name
                    yield place.name, read(place)
                    taken += 1

        model = self.model_runner.get_model()
        with _recording(current, layers), _quiet():
            self.reload_weights(weights_iterator=weights())
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if taken != len(wanted) or missing:
            raise ReloadError(
                f"vLLM loaded {taken} of {len(wanted)} tensors; parameters without values: {missing[:3]}"
            )
        packed.remember(wanted, layers, {id(module): module for module in model.modules()})

    def _peanut_packed_layers(self) -> PackedLayers:
        if not hasattr(self, "peanut_packed"):
            settings = ServerSettings.read()
            self.peanut_packed = PackedLayers(settings.packed_cache if settings is not None else 0)
        return self.peanut_packed

    @contextmanager
    def _peanut_reading(self, places: Sequence[Place]) -> Iterator[Callable[[Place], Tensor]]:
        """Yield a function that gives each tensor as it is in a checkpoint."""
        if all(isinstance(place, TensorInfo) for place in places):
            with source(places) as read_file:
                yield read_file
            return
        kept = self._peanut_kept_weights()
        with source(places) as read_file, self.peanut_staging.factors(places) as factor:

            def read(place: Place) -> Tensor:
                if isinstance(place, UpdatedTensor):
                    return kept.updated(place.base, factor(place.up), factor(place.down))
                return kept.whole(place.base) if isinstance(place, KeptTensor) else read_file(place)

            try:
                yield read
                kept.check()
            finally:
                kept.forget()

    def _peanut_kept_weights(self) -> KeptWeights:
        if not hasattr(self, "peanut_kept"):
            raise KeptWeightsError("this worker keeps no W0: it was started without --base-copy device")
        return self.peanut_kept

    def peanut_learn(self, places: str, keeps: bool = False) -> list[list[str]]:
        """Load the whole model; returns groups of tensors in the checkpoint that must be loaded together.

        The tensors of a layer, fused or not, are in one group; a tensor that vLLM does not load is in no group.

        Args:
            places: the tensors, in files.
            keeps: be ready to keep tensors of the base: learn too which part of each one this worker loads.
        """
        layers: dict[str, set[int]] = {}
        current = NamedStorages()
        recorder = BoxRecorder()
        infos = _in_files(places)

        def weights() -> Iterator[tuple[str, Tensor]]:
            """Those of the files, noted before vLLM loads them."""
            with TensorReader() as reader:
                for info in infos:
                    tensor = reader.whole(info)
                    current.add(info.name, tensor)
                    recorder.watch(info.name, tensor)
                    yield info.name, tensor

        with _recording(current, layers), _quiet(), recorder if keeps else nullcontext():
            self.reload_weights(weights_iterator=weights())
        if keeps:
            device = next(self.model_runner.get_model().parameters()).device
            self.peanut_kept, self.peanut_staging = KeptWeights(device, recorder.boxes), StagedFactors(device)
        return join_groups(layers)

    def peanut_room(self, places: str) -> tuple[str, int, int]:
        """The device, the bytes that it takes to keep tensors of the base too, and those that are free."""
        kept = self._peanut_kept_weights()
        return str(kept.device), kept.needed(_in_files(places)), kept.free()

    def peanut_keep(self, places: str) -> int:
        """Keep tensors of the base, from its files, in the memory of the device; returns the size of all copies."""
        kept = self._peanut_kept_weights()
        kept.keep(_in_files(places))
        return kept.nbytes

    def peanut_stage(self, places: str) -> None:
        """Map what a swap to these places will read, and copy its factors to the device."""
        wanted = decode_places(places)
        staging = self.peanut_staging if hasattr(self, "peanut_staging") else StagedFactors(torch.device("cpu"))
        staging.stage(wanted)


def _in_files(places: str) -> list[TensorInfo]:
    """Decode places of tensors that are in files. Raises `ValueError` if another one is among them."""
    found = decode_places(places)
    infos = [place for place in found if isinstance(place, TensorInfo)]
    if len(infos) != len(found):
        raise ValueError(f"{len(found) - len(infos)} of {len(found)} tensors are not in files")
    return infos


def join_groups(layers: dict[str, set[int]]) -> list[list[str]]:
    """Group tensors that share a layer, directly or through other tensors."""
    group_of: dict[int, list[str]] = {}
    for name, own in layers.items():
        merged = [name]
        for group in {id(group_of[layer]): group_of[layer] for layer in own if layer in group_of}.values():
            merged = group + merged
        for layer, group in list(group_of.items()):
            if layer in own or set(group) <= set(merged):
                group_of[layer] = merged
        group_of |= dict.fromkeys(own, merged)
    return list({id(group): group for group in group_of.values()}.values())


# those that are open, at most one: tensors in progress, and the layers that load each tensor
_recordings: list[tuple[NamedStorages, dict[str, set[int]]]] = []


@contextmanager
def _recording(current: NamedStorages, layers: dict[str, set[int]]) -> Iterator[None]:
    """Record in `layers` which layers load which tensor, by the storages of the tensors in progress.

    Every loader that vLLM wraps for a reload is wrapped once more. If a model loads a modified copy of a tensor, the
    copy is attributed to the last tensor that was yielded. vLLM keeps the wrapped loaders of layers that a reload
    leaves out, and uses them in the next one: so they record for whoever records then.
    """
    reload: Any = layerwise
    make = reload.make_online_process_loader

    def make_recording(layer: torch.nn.Module, parameter: str) -> Callable[..., Any]:
        """Replaces `make_online_process_loader`."""
        load = make(layer, parameter)

        @wraps(load)  # keeps its name, by which vLLM recognizes a wrapped loader
        def recording(*args: Any, **kwargs: Any) -> Any:
            """Record which tensor the layer loads, and load it."""
            for names_of, layers_of in _recordings:
                tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                found = [names_of.name_of(one) for one in tensors if not one.is_meta]
                name = next((name for name in found if name is not None), names_of.latest)
                layers_of.setdefault(name, set()).add(id(layer))
            return load(*args, **kwargs)

        return recording

    reload.make_online_process_loader = make_recording
    _recordings.append((current, layers))
    try:
        yield
    finally:
        reload.make_online_process_loader = make
        _recordings.pop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress vLLM's warning for each layer that is not loaded: most are left out on purpose."""
    loggers = [
        logging.getLogger(f"vllm.model_executor.model_loader.reload.{name}") for name in ("layerwise", "inplace")
    ]
    levels = [logger.level for logger in loggers]
    for logger_ in loggers:
        logger_.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger_, level in zip(loggers, levels, strict=True):
            logger_.setLevel(level)
