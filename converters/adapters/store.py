"""The weights file of an adapter, safetensors or pickle; tensors are loaded when they are needed."""

import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from converters.adapters.distributed import refuse_sharded_objects
from converters.errors import CheckpointError, ThetaError
from converters.files.blocks import block_rows
from converters.files.header import FLOAT_DTYPES, TensorInfo, read_header
from converters.files.state import FileState

# keys under which training loops store the model's state dict in their own checkpoints
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")

_DTYPES = {
    **FLOAT_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ThetaStore(Protocol):
    """Named tensors on disk."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""

    def blocks(self, key: str) -> Iterator[Tensor]:
        """One tensor in blocks of rows, a scalar as it is; for tensors that may be as large as an embedding."""

    def check_unchanged(self) -> None:
        """Raise `ThetaError` if the file changed since it was opened."""


class _File:
    """The file behind a store."""

    def __init__(self, path: Path) -> None:
        self._path, self._opened = path, FileState.of(path)

    def check_unchanged(self) -> None:
        """Raise `ThetaError` if the file changed since it was opened."""
        if FileState.of(self._path) != self._opened:
            raise ThetaError(f"{self._path} changed while it was merged; nothing was written; merge again")


class SafetensorsStore(_File):
    """θ in a safetensors file. It is read, not mapped: truncating it meanwhile is an error and not a SIGBUS."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            infos, _ = read_header(path)
        except CheckpointError as error:
            raise ThetaError(str(error)) from None
        self.shapes = {info.name: info.shape for info in infos}
        if unknown := [info for info in infos if info.dtype not in _DTYPES]:
            raise ThetaError(f"{path}: {unknown[0].name} is {unknown[0].dtype}; expected floating-point θ")
        self.dtypes = {info.name: _DTYPES[info.dtype] for info in infos}
        self._infos = {info.name: info for info in infos}

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._read(self._infos[key], 0, self._infos[key].nbytes).view(self.dtypes[key]).view(self.shapes[key])

    def blocks(self, key: str) -> Iterator[Tensor]:
        """One tensor in blocks of rows; a scalar as it is."""
        info, dtype = self._infos[key], self.dtypes[key]
        if not info.shape:
            yield self.tensor(key)
            return
        step = block_rows(info.row_size) * info.row_size * dtype.itemsize
        for start in range(0, info.nbytes, max(1, step)):
            data = self._read(info, start, min(step, info.nbytes - start))
            yield data.view(dtype).view(-1, *info.shape[1:])

    def _read(self, info: TensorInfo, start: int, size: int) -> Tensor:
        """Bytes `start : start + size` of a tensor. For any thread."""
        data = torch.empty(size, dtype=torch.uint8)
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(info.offset + start)
                got = file.readinto(data.numpy().data)
        except OSError as error:
            raise ThetaError(f"{self._path}: cannot read {info.name} ({error}); check the disk") from None
        if got != size:
            raise ThetaError(f"{self._path}: ends in the middle of {info.name}; it was truncated while it was read")
        return data


class PickleStore(_File):
    """θ in a torch pickle, opened with `weights_only=True`: no code in it can run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unusual pickle protocols; what cannot be read is an error
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            refuse_sharded_objects(path, str(error))
            raise ThetaError(
                f"{path}: this pickle contains more than tensors and was not opened, because it could run code; "
                "save the adapter as safetensors where it was trained"
            ) from None
        except PermissionError as error:
            raise ThetaError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
        except Exception as error:  # a damaged pickle makes the unpickler raise almost anything
            cause = (str(error).splitlines() or ["it is empty"])[0]
            raise ThetaError(f"{path}: not a complete torch file ({cause}); it may be truncated") from None
        state = _inner_state(state)
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ThetaError(f"{path}: contains a {type(state).__name__}; expected a state dict of tensors")
        refuse_sharded_objects(path, " ".join(type(t).__module__ for t in state.values()))
        self._state: dict[str, Tensor] = {str(key): tensor.detach() for key, tensor in state.items()}
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._state.items()}
        self.dtypes = {key: tensor.dtype for key, tensor in self._state.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._state[key]

    def blocks(self, key: str) -> Iterator[Tensor]:
        """One tensor in blocks of rows; a scalar as it is."""
        tensor = self._state[key]
        yield from torch.split(tensor, block_rows(math.prod(tensor.shape[1:]))) if tensor.dim() else [tensor]


def _inner_state(state: object) -> object:
    """The model's state dict inside a training checkpoint (`{"model": ..., "epoch": ...}`), or `state` itself."""
    if isinstance(state, dict):
        inner = [state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict)]
        if len(inner) == 1:
            return inner[0]
    return state


def open_store(path: Path) -> ThetaStore:
    """Open a file of weights, safetensors or a torch pickle. Raises `ThetaError` if it is damaged or unsafe."""
    return SafetensorsStore(path) if path.suffix == ".safetensors" else PickleStore(path)
