"""ONNX Runtime, with what a caller cannot forget: adapters are applied, inputs fit, threads are bounded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CheckpointError
from converters.inference.runtime import onnxruntime

Arrays = Mapping[str, NDArray[Any]]

_FATAL_ONLY = 4  # every error is an exception as well


class LoadedAdapter:
    """An `.onnx_adapter` file in memory.

    Args:
        file: the file.

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
    """A graph that is ready to run. May be used by several threads.

    Args:
        model: the .onnx file; its external data lies beside it.
        threads: for one run; all cores by default.
        providers: ONNX Runtime's execution providers, by default the CPU's.

    Raises `CheckpointError` if the file is missing, damaged, or of an opset that this ONNX Runtime cannot run.
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
        """The first output, for inputs by name; `adapter` is active in this run alone.

        Not by way of I/O binding: ONNX Runtime 1.32 ignores adapters there in silence.
        """
        feed = {name: arrays[name] for name in self.inputs}
        found: NDArray[np.float32] = self._session.run(None, feed, adapter.options if adapter else None)[0]
        return found


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
