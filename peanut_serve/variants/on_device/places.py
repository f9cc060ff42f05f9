"""Where a worker of the engine gets a tensor: in a file, in its copy of W0, or from that copy and exact factors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.serving import TensorInfo, TensorSpec


@dataclass(frozen=True)
class Factored:
    """A tensor that differs from W0 by `up @ down`, before its factors are written.

    Attributes:
        base: W0 (out, in), in the base's files.
        up: (out, r).
        down: (r, in).
    """

    base: TensorInfo
    up: TensorSpec
    down: TensorSpec


@dataclass(frozen=True)
class KeptTensor:
    """A tensor of the base, which every worker keeps in the memory of its device as far as it loads it.

    Attributes:
        base: the tensor in the base's files, which are not read for this.
    """

    base: TensorInfo

    @property
    def name(self) -> str:
        """In the checkpoint."""
        return self.base.name

    @property
    def nbytes(self) -> int:
        """Bytes that a swap sends for it."""
        return 0


@dataclass(frozen=True)
class UpdatedTensor:
    """`W0 + up @ down`, evaluated by the workers, which keep W0, and rounded once to its dtype.

    Attributes:
        base: W0 (out, in), in the base's files, which are not read for this.
        up: (out, r), in host memory.
        down: (r, in), in host memory.
    """

    base: TensorInfo
    up: TensorInfo
    down: TensorInfo

    @property
    def name(self) -> str:
        """In the checkpoint."""
        return self.base.name

    @property
    def nbytes(self) -> int:
        """Bytes that a swap sends for it."""
        return self.up.nbytes + self.down.nbytes


Place = TensorInfo | KeptTensor | UpdatedTensor


def encode_places(places: Sequence[Place]) -> str:
    """Encode tensors for the workers, as JSON: vLLM's `collective_rpc` cannot send tensors."""
    return json.dumps([_encoded(place) for place in places])


def decode_places(places: str) -> list[Place]:
    """Decode the result of `encode_places`."""
    return [_decoded(entry) for entry in json.loads(places)]


def _encoded(place: Place) -> Any:
    if isinstance(place, TensorInfo):
        return _fields(place)
    if isinstance(place, KeptTensor):
        return {"base": _fields(place.base)}
    return {"base": _fields(place.base), "up": _fields(place.up), "down": _fields(place.down)}


def _fields(info: TensorInfo) -> list[Any]:
    return [info.name, info.dtype, info.shape, str(info.file), info.offset, info.nbytes]


def _decoded(entry: Any) -> Place:
    if not isinstance(entry, Mapping):
        return _info(entry)
    infos = {part: _info(fields) for part, fields in entry.items()}
    return UpdatedTensor(**infos) if len(infos) > 1 else KeptTensor(**infos)


def _info(fields: Sequence[Any]) -> TensorInfo:
    name, dtype, shape, file, offset, nbytes = fields
    return TensorInfo(name, dtype, tuple(shape), Path(file), offset, nbytes)
