"""Recomputing a part of an updated weight in float64, from numbers that are read apart from what the merge read."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from converters.files.blocks import block_rows
from converters.files.header import TensorInfo
from converters.files.reader import TensorReader
from converters.methods.weight_delta import Reads, WeightDelta
from converters.plans.tensor import TensorPlan

_SAMPLES = 8  # columns, or rows, of each updated weight


def recompute(
    tensor: TensorPlan, rows: Tensor, columns: Tensor, deltas: Sequence[WeightDelta], reader: TensorReader
) -> tuple[Tensor, Tensor, Tensor]:
    """W0, the sum of its updates, and the magnitudes all of that was added up from; each (rows, columns), float64."""
    if tensor.source is None:
        raise ValueError(f"{tensor.name} is not from the base")
    read = _W0(tensor.source.as_matrix(tensor.matrix_shape), rows, columns, {delta.reads for delta in deltas}, reader)
    w0 = read.of(Reads.NOTHING)
    total, spread = torch.zeros_like(w0), w0.abs()
    for delta in deltas:
        found, magnitude = delta.delta_at(read.of(delta.reads), rows, columns)
        total, spread = total + found, spread + magnitude
    return w0, total, spread


class _W0:
    """What of W0 has to be read to recompute some rows and columns.

    Args:
        info: the weight.
        rows, columns: what is recomputed.
        reads: what its updates depend on.
        reader: reads the base.
    """

    def __init__(
        self, info: TensorInfo, rows: Tensor, columns: Tensor, reads: set[Reads], reader: TensorReader
    ) -> None:
        self._rows, self._columns, self._shape = rows, columns, info.shape
        self._whole = read_rows(info, torch.arange(info.shape[0]), reader) if Reads.WHOLE in reads else None
        self._at_rows = read_rows(info, rows, reader) if reads & {Reads.ROWS, Reads.SHAPE} else None
        by_columns = Reads.COLUMNS in reads or (self._whole is None and self._at_rows is None)
        self._at_columns = read_columns(info, columns, reader) if by_columns else None

    def of(self, reads: Reads) -> Tensor:
        """W0 at the rows, at the columns, whole, or its shape alone; else at both."""
        if reads is Reads.SHAPE:
            return torch.full((), torch.nan, dtype=torch.float64).expand(self._shape)
        known = {Reads.WHOLE: self._whole, Reads.ROWS: self._at_rows, Reads.COLUMNS: self._at_columns}.get(reads)
        if known is not None:
            return known
        if self._at_columns is not None:
            return self._at_columns[self._rows]
        if self._at_rows is not None:
            return self._at_rows[:, self._columns]
        if self._whole is not None:
            return self._whole[self._rows][:, self._columns]
        raise ValueError("nothing of W0 was read")


def sample_places(tensor: TensorPlan, deltas: Sequence[WeightDelta]) -> tuple[Tensor, Tensor]:
    """Rows and columns to recompute: some of those that need much of W0 each, all of the others."""
    reads = {delta.reads for delta in deltas}
    by_rows = bool(reads & {Reads.ROWS, Reads.SHAPE, Reads.WHOLE})
    rows = _pick(tensor.matrix_shape[0], sampled=by_rows)
    columns = _pick(tensor.matrix_shape[1], sampled=not by_rows or Reads.COLUMNS in reads)
    return rows, columns


def _pick(size: int, sampled: bool) -> Tensor:
    """Indices: all, or some that are evenly spread."""
    return torch.linspace(0, size - 1, min(_SAMPLES, size)).long() if sampled else torch.arange(size)


def read_rows(info: TensorInfo, picked: Tensor, reader: TensorReader) -> Tensor:
    """Some rows of a matrix, in float64."""
    # copies: the reader has one buffer, of which a row that is float64 already would be a view
    return torch.stack([reader.row(info, int(row)).to(torch.float64, copy=True) for row in picked])


def read_columns(info: TensorInfo, picked: Tensor, reader: TensorReader) -> Tensor:
    """Some columns of a matrix, in float64. Holds one block beside them."""
    blocks: Iterator[Tensor] = reader.row_blocks(info, block_rows(info.row_size))
    return torch.cat([block.index_select(1, picked).double() for block in blocks])
