"""Tensors of a base with more rows, in temporary files."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.errors import CheckpointError
from converters.files.blocks import block_rows
from converters.files.header import FLOAT_DTYPES, TensorInfo, TensorSpec, read_header
from converters.files.reader import TensorReader
from converters.files.writer import ShardWriter


@dataclass(frozen=True, eq=False)
class Addition:
    """Rows below those of a tensor.

    Attributes:
        info: the tensor.
        rows: what comes below its rows.
        dtype: of the result.
    """

    info: TensorInfo
    rows: Tensor
    dtype: str


@dataclass(frozen=True, eq=False)
class Longer:
    """Tensors with more rows.

    Attributes:
        tensors: name -> where it is.
        holder: as long as it exists, so do the files.
    """

    tensors: Mapping[str, TensorInfo]
    holder: object


def mean_row(info: TensorInfo) -> Tensor:
    """The mean of all rows of a matrix, (1, width), in float64."""
    with TensorReader() as reader:
        sums = [block.double().sum(dim=0) for block in reader.row_blocks(info, block_rows(info.row_size))]
    return (torch.stack(sums).sum(dim=0) / info.shape[0])[None]


def write_longer(additions: Sequence[Addition]) -> Longer:
    """Write tensors with their additional rows to temporary files, which are called as those of the base.

    Raises `CheckpointError` if they cannot be written.
    """
    holder = tempfile.TemporaryDirectory(prefix="peanut-rows-")
    tensors: dict[str, TensorInfo] = {}
    try:
        for name in sorted({one.info.file.name for one in additions}):
            file = Path(holder.name) / name
            _write(file, [one for one in additions if one.info.file.name == name])
            tensors |= {info.name: info for info in read_header(file)[0]}
    except OSError as error:
        holder.cleanup()
        raise CheckpointError(
            f"the resized embeddings could not be written to {holder.name} ({error}); point TMPDIR to a disk with "
            "enough space"
        ) from None
    return Longer(tensors, holder)


def _write(file: Path, additions: Sequence[Addition]) -> None:
    specs = []
    for one in additions:
        shape = (one.info.shape[0] + len(one.rows), *one.info.shape[1:])
        size = math.prod(shape) * FLOAT_DTYPES[one.dtype].itemsize
        specs.append(TensorSpec(one.info.name, one.dtype, shape, size))
    with closing(ShardWriter(file, specs, {"format": "pt"})) as writer, TensorReader() as reader:
        for one in additions:
            done, dtype = 0, FLOAT_DTYPES[one.dtype]
            for block in (*reader.row_blocks(one.info, block_rows(one.info.row_size)), one.rows):
                piece = block.to(dtype).contiguous()
                writer.write(one.info.name, done, piece)
                done += piece.nbytes
        writer.finish()
