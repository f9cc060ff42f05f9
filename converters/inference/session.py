"""ONNX Runtime sessions that select the inputs, apply adapters and limit threads for the caller."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CheckpointError
from converters.inference.runtime import onnxruntime

Arrays = Mapping[str, NDArray[Any]]

_FATAL_ONLY = 4  # errors are raised as exceptions as well


class LoadedAdapter:
    """An `.onnx_adapter` file in memory.

    Args:
        file: the file to load.

    Raises `CheckpointError` if it is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        self._adapter = onnxruntime.LoraAdapter()
        try:
            self._adapter.Load(str(file.resolve()))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise CheckpointError(f"{file} cannot be loaded as an ONNX Runtime adapter: {_brief(error)}") from None
        self.options = onnxruntime.RunOptions()
        self.options.add_active_adapter(self._adapter)


class Session:
    """A graph that is ready to run. Thread-safe.

    Args:
        model: the .onnx file, with its external data next to it.
        threads: the number of threads of one run; all cores by default.
        providers: ONNX Runtime's execution providers; by default the CPU.

    Raises `CheckpointError` if the file is missing or damaged, or if this ONNX Runtime does not support its opset.
    """

    def __init__(self, model: Path, threads: int | None = None, providers: tuple[str, ...] = ()) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        wanted = list(providers) or ["CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=wanted)
        except Exception as error:  # as above
            raise CheckpointError(f"{model} cannot be loaded by ONNX Runtime: {_brief(error)}") from None
        self.inputs = tuple(one.name for one in self._session.get_inputs())
        self.overridable = tuple(one.name for one in self._session.get_overridable_initializers())
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def run(self, arrays: Arrays, adapter: LoadedAdapter | None = None) -> NDArray[np.float32]:
        """The first output for the named inputs. `adapter` is active in this run only."""
        return self.run_all(arrays, adapter)[0]

    def run_all(self, arrays: Arrays, adapter: LoadedAdapter | None = None) -> list[NDArray[np.float32]]:
        """Every output for the named inputs. `adapter` is active in this run only.

        This does not use I/O binding, with which ONNX Runtime 1.32 silently ignores adapters.
        """
        feed = {name: arrays[name] for name in self.inputs}
        found: list[NDArray[np.float32]] = self._session.run(None, feed, adapter.options if adapter else None)
        return found


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
