"""The weights file of an adapter, safetensors or pickle, with tensors loaded when they are asked for."""

import pickle
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from converters.errors import CheckpointError, ThetaError
from converters.tensor_file import read_header


class ThetaStore(Protocol):
    """Named tensors on disk."""

    shapes: dict[str, tuple[int, ...]]

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""


class SafetensorsStore:
    """θ in a safetensors file; tensors are mapped, not copied."""

    def __init__(self, path: Path) -> None:
        try:
            infos, _ = read_header(path)
        except CheckpointError as error:
            raise ThetaError(str(error)) from None
        self.shapes = {info.name: info.shape for info in infos}
        self._file = safe_open(path, framework="pt")

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
        return tensor


class PickleStore:
    """θ in a torch pickle, opened with `weights_only=True`: no code in it can run."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:
            raise ThetaError(
                f"{path}: this pickle holds more than tensors and was not opened, since it could run code; "
                "save the adapter as safetensors where it was trained"
            ) from None
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            cause = (str(error).splitlines() or ["it is empty"])[0]
            raise ThetaError(f"{path}: not a whole torch file ({cause}); it may be truncated") from None
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ThetaError(f"{path}: holds a {type(state).__name__}, wanted a state dict of tensors")
        self._state: dict[str, Tensor] = {str(key): tensor.detach() for key, tensor in state.items()}
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._state.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._state[key]


def open_store(folder: Path, safetensors_name: str, pickle_name: str) -> ThetaStore:
    """Open the weights of an adapter folder; safetensors wins over a pickle.

    Raises `ThetaError` when there are none, or they are damaged or unsafe.
    """
    if (folder / safetensors_name).is_file():
        return SafetensorsStore(folder / safetensors_name)
    if (folder / pickle_name).is_file():
        return PickleStore(folder / pickle_name)
    raise ThetaError(f"{folder}: no {safetensors_name} (nor {pickle_name}); the adapter has a config but no weights")
