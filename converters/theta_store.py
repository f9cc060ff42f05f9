"""The weights file of an adapter, safetensors or pickle, with tensors loaded when they are asked for."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from converters.errors import CheckpointError, ThetaError
from converters.tensor_file import read_header

# under which training loops put the state dict of the model into a checkpoint of their own
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")


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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unusual pickle protocols; what cannot be read is an error
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:
            raise ThetaError(
                f"{path}: this pickle holds more than tensors and was not opened, since it could run code; "
                "save the adapter as safetensors where it was trained"
            ) from None
        except Exception as error:  # a damaged pickle makes the unpickler raise almost anything
            cause = (str(error).splitlines() or ["it is empty"])[0]
            raise ThetaError(f"{path}: not a whole torch file ({cause}); it may be truncated") from None
        state = _inner_state(state)
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ThetaError(f"{path}: holds a {type(state).__name__}, wanted a state dict of tensors")
        self._state: dict[str, Tensor] = {str(key): tensor.detach() for key, tensor in state.items()}
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._state.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._state[key]


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
