"""Swaps weights in every vLLM worker: `--worker-extension-cls` mixes `VariantWorker` into the worker.

Weights are passed as places in files, because vLLM's `collective_rpc` cannot send tensors. They are loaded by vLLM's
own layerwise reload (`vllm/model_executor/model_loader/reload`), under their names in the checkpoint, so that vLLM
fuses, shards, pads and repacks them as usual.
"""

import json
import logging
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.model_loader.reload import layerwise

from converters.errors import PeanutError
from converters.serving import TensorInfo, TensorReader
from peanut_serve.vllm_plugin.binding import bind

logger = logging.getLogger("vllm.peanut_serve")

_READ_ONLY_REGISTERED = 8  # cudaHostRegisterReadOnly


class ReloadError(PeanutError):
    """vLLM did not load all tensors."""


class VariantWorker:
    """RPC methods; `self` is vLLM's worker."""

    model_runner: Any
    reload_weights: Callable[..., None]

    def peanut_apply(self, places: str) -> float:
        """Load tensors into the model; returns the seconds taken. After a failure, all tensors must be loaded again.

        Args:
            places: see `encode_places`. All tensors of every changed layer must be included.

        Raises `ReloadError` if vLLM did not load all of them.
        """
        start = time.perf_counter()
        infos, taken = decode_places(places), 0

        def weights() -> Iterator[tuple[str, Tensor]]:
            nonlocal taken
            with _source(infos) as read:
                for info in infos:
                    yield info.name, read(info)
                    taken += 1

        with _quiet():
            self.reload_weights(weights_iterator=weights())
        missing = [name for name, parameter in self.model_runner.get_model().named_parameters() if parameter.is_meta]
        if taken != len(infos) or missing:
            raise ReloadError(
                f"vLLM loaded {taken} of {len(infos)} tensors; parameters without values: {missing[:3]}"
            )
        return time.perf_counter() - start

    def peanut_bind(self, resident: str | None) -> None:
        """Forget all LoRA adapters, and load only those that belong to these weights from now on.

        Args:
            resident: digest of the merged weights that the model has; None for those of the base.
        """
        bind(resident)
        self.model_runner.lora_manager.remove_all_adapters()

    def peanut_learn(self, places: str) -> list[list[str]]:
        """Load the whole model; returns groups of tensors in the checkpoint that must be loaded together.

        The tensors of a layer, fused or not, are in one group; a tensor that vLLM does not load is in no group.
        """
        layers: dict[str, set[int]] = {}
        current: dict[int, str] = {}
        infos = decode_places(places)

        def weights() -> Iterator[tuple[str, Tensor]]:
            with TensorReader() as reader:
                for info in infos:
                    tensor = reader.whole(info)
                    current[tensor.untyped_storage().data_ptr()] = current[0] = info.name
                    yield info.name, tensor

        with _recording(current, layers), _quiet():
            self.reload_weights(weights_iterator=weights())
        return join_groups(layers)


def encode_places(infos: Sequence[TensorInfo]) -> str:
    """Encode tensors for `VariantWorker`, as JSON."""
    return json.dumps([[i.name, i.dtype, i.shape, str(i.file), i.offset, i.nbytes] for i in infos])


def decode_places(places: str) -> list[TensorInfo]:
    """Decode the result of `encode_places`."""
    return [
        TensorInfo(name, dtype, tuple(shape), Path(file), offset, nbytes)
        for name, dtype, shape, file, offset, nbytes in json.loads(places)
    ]


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


class _Maps:
    """Files in host memory that this worker has mapped. Keeping them mapped saves the next swap page faults."""

    def __init__(self) -> None:
        self._maps: dict[tuple[str, int], Tensor] = {}  # by path and inode: paths in /proc are reused

    def refresh(self) -> None:
        """Unmap files that the server has closed, so that their memory is freed."""
        for path, inode in [key for key in self._maps if _inode(key[0]) != key[1]]:
            _unpin(self._maps.pop((path, inode)))

    def whole(self, file: Path) -> Tensor:
        """All bytes of a file."""
        with file.open("rb") as opened:
            key = (str(file), os.fstat(opened.fileno()).st_ino)
            if key not in self._maps:
                self._maps[key] = _map(opened.fileno())
        return self._maps[key]


_maps = _Maps()


def _map(descriptor: int) -> Tensor:
    """Map the bytes of a file, page-locked if there is a GPU, which can then copy from them directly."""
    mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tensor being read-only, which is intended
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
    if torch.cuda.is_available():
        code = _cuda_runtime().cudaHostRegister(whole.data_ptr(), whole.nbytes, _READ_ONLY_REGISTERED)
        if int(code) != 0:
            logger.warning("cannot pin %d MiB of host memory (%s); swaps copy more slowly", whole.nbytes >> 20, code)
    return whole


def _unpin(whole: Tensor) -> None:
    """Undo the page lock of a file, before it is unmapped."""
    if torch.cuda.is_available():
        _cuda_runtime().cudaHostUnregister(whole.data_ptr())  # harmless error if it was not pinned


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino  # noqa: PTH116
    except OSError:
        return None


@contextmanager
def _source(infos: Sequence[TensorInfo]) -> Iterator[Callable[[TensorInfo], Tensor]]:
    """Yield a function that reads a tensor: without a copy if it is in the server's memory, otherwise from disk."""
    _maps.refresh()
    mapped = {file: _maps.whole(file) for file in {info.file for info in infos} if file.is_relative_to("/proc")}
    with TensorReader() as reader:

        def read(info: TensorInfo) -> Tensor:
            if info.file not in mapped:
                return reader.whole(info)
            data = mapped[info.file][info.offset : info.offset + info.nbytes]
            return data.view(info.torch_dtype).reshape(info.shape)

        yield read


@contextmanager
def _recording(current: dict[int, str], layers: dict[str, set[int]]) -> Iterator[None]:
    """Record in `layers` which layers load which tensor; `current` maps storages to the names of tensors in progress.

    Every loader that vLLM wraps for a reload is wrapped once more. If a model loads a modified copy of a tensor, the
    copy is attributed to the last tensor that was yielded.
    """
    reload: Any = layerwise
    make, is_over = reload.make_online_process_loader, False

    def make_recording(layer: torch.nn.Module, parameter: str) -> Callable[..., Any]:
        """Replaces `make_online_process_loader`."""
        load = make(layer, parameter)

        @wraps(load)  # keeps its name, by which vLLM recognizes a wrapped loader
        def recording(*args: Any, **kwargs: Any) -> Any:
            """Record which tensor the layer loads, and load it."""
            if is_over:
                return load(*args, **kwargs)  # vLLM keeps the wrapped loaders
            tensors = [
                value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and not value.is_meta
            ]
            names = [current.get(tensor.untyped_storage().data_ptr()) for tensor in tensors]
            name = next((name for name in names if name is not None), current[0])
            layers.setdefault(name, set()).add(id(layer))
            return load(*args, **kwargs)

        return recording

    reload.make_online_process_loader = make_recording
    try:
        yield
    finally:
        reload.make_online_process_loader, is_over = make, True
        current.clear()


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
