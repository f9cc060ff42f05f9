"""The output of a merge for one tensor, in blocks of rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from converters.errors import NonFiniteError
from converters.evaluation.precision import dtype_of
from converters.evaluation.worker import Worker
from converters.files.blocks import block_rows
from converters.files.header import FLOAT_DTYPES, TensorInfo
from converters.files.reader import TensorReader
from converters.methods.finite import all_finite
from converters.methods.update import merge_rows
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan


def tensor_blocks(plan: Plan, tensor: TensorPlan, worker: Worker) -> Iterator[Tensor]:
    """A tensor of the output; a block is valid until the next.

    Raises `NonFiniteError` when a value does not fit the dtype.
    """
    if tensor.terms and tensor.source is not None:
        yield from (merged for _, merged in updated_blocks(tensor.source, [(plan, tensor)], worker))
    elif tensor.is_copy and tensor.source is not None:
        yield from worker.reader.chunks(tensor.source)
    else:
        yield from unchanged_blocks(tensor, plan, worker.reader)


def updated_blocks(
    source: TensorInfo, merges: Sequence[tuple[Plan, TensorPlan]], worker: Worker
) -> Iterator[tuple[int, Tensor]]:
    """`W0 + Σ delta` for each of several merges of one W0, which is read once, or twice; with the merge's index.

    Raises `NonFiniteError` when a value does not fit the dtype.
    """
    shape = merges[0][1].matrix_shape
    source = source.as_matrix(shape)
    updates = [
        [
            delta.update(shape, dtype_of(delta, tensor.dtype), worker.device)
            for delta in map(plan.delta_of, tensor.terms)
        ]
        for plan, tensor in merges
    ]
    first = [update for several in updates for update in several if update.needs_pass]
    if first:
        for start, w0 in worker.wide_blocks(source):
            for update in first:
                update.see(w0, start)
        for update in first:
            update.settle()
    for start, w0 in worker.wide_blocks(source):
        for index, ((_, tensor), several) in enumerate(zip(merges, updates, strict=True)):
            block = w0 if index == len(merges) - 1 else worker.copy_of(w0)
            merged = merge_rows(block, several, start)
            yield index, _finite(worker.rounded(merged, FLOAT_DTYPES[tensor.dtype]), tensor)


def unchanged_blocks(tensor: TensorPlan, plan: Plan, reader: TensorReader) -> Iterator[Tensor]:
    """A tensor of the base or of the adapter that is written in another dtype, in blocks of rows.

    Raises `NonFiniteError` when a value does not fit the dtype.
    """
    if tensor.source is not None:
        blocks = reader.row_blocks(tensor.source, block_rows(tensor.source.row_size))
    elif tensor.saved is not None:
        blocks = plan.head.saved_blocks(tensor.saved)
    else:
        raise ValueError(f"{tensor.name}: neither saved nor from the base")
    for block in blocks:
        yield _cast(block, tensor)


def _cast(numbers: Tensor, tensor: TensorPlan) -> Tensor:
    if not numbers.is_floating_point():
        return numbers.contiguous()
    cast = numbers.to(FLOAT_DTYPES[tensor.dtype]).contiguous()
    return cast if not all_finite(numbers) else _finite(cast, tensor)  # an Inf of the base stays one


def _finite(merged: Tensor, tensor: TensorPlan) -> Tensor:
    if not all_finite(merged):
        remedy = (
            "; use dtype='bf16' or dtype='fp32'" if tensor.dtype == "F16" else "; is this the base it was trained on?"
        )
        raise NonFiniteError(
            f"{tensor.name}: merged weights do not fit {tensor.dtype} (NaN, or larger than "
            f"{torch.finfo(merged.dtype).max:g}){remedy}"
        )
    return merged
