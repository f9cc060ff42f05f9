"""The jobs of a merge: each writes, and checks, everything that is made of one tensor of the base."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from converters.byte_copy import SourceError, copy_file
from converters.draft import Draft
from converters.errors import CheckpointError, NonFiniteError
from converters.evaluation import Update, block_rows, merge_rows
from converters.finite import all_finite
from converters.journal import Written
from converters.plan import Plan
from converters.tensor_file import FLOAT_DTYPES, TensorInfo
from converters.tensor_plan import TensorPlan
from converters.tensor_reader import TensorReader
from converters.verify import verify_tensor
from converters.worker import EVALUATION_DTYPE, Worker


class Output:
    """One tensor of one output.

    Args:
        draft: the output.
        shard: the file in it.
        tensor: what is to become of it.
        place: where it lies in the draft.
    """

    def __init__(self, draft: Draft, shard: str, tensor: TensorPlan, place: TensorInfo) -> None:
        self.draft, self.shard, self.tensor, self.place = draft, shard, tensor, place
        self.taken_over = False
        self._done, self._digest = 0, xxhash.xxh3_128()

    @property
    def was_written(self) -> bool:
        """Whether an earlier run noted it as written."""
        return self.tensor.name in self.draft.journal.finished

    def take_over(self, verify: bool, worker: Worker) -> None:
        """Take over what an earlier run wrote, if its bytes are still there, and were verified if they are to be."""
        earlier = self.draft.journal.finished[self.tensor.name]
        if (verify and earlier.recomputed is None) or not self.place.file.exists():
            return
        if worker.reader.hash(self.place) == earlier.digest:
            self.draft.written[self.tensor.name] = earlier
            self.draft.taken_over += 1
            self.draft.advance(self.tensor.nbytes * (2 if verify else 1))
            self.taken_over = True

    def put(self, piece: Tensor) -> None:
        """Write the next piece."""
        self.draft.open_shard(self.shard).write(self.tensor.name, self._done, piece)
        self._digest.update(piece.reshape(-1).view(torch.uint8).numpy().data)
        self._done += piece.nbytes
        self.draft.advance(piece.nbytes)

    def end(self, verify: bool, worker: Worker) -> None:
        """The last piece was put: hold it against what should be, see `verify.py`, and let it go to the disk."""
        self.draft.open_shard(self.shard).start_writeback(self.tensor.name)
        self.record(self._digest.hexdigest(), verify, worker)

    def record(self, digest: str, verify: bool, worker: Worker) -> None:
        """Note the tensor as written, with the xxh3_128 it should have; verified if it is to be."""
        written = Written(digest)
        if verify:
            plan = self.draft.plan
            tweakers = [plan.tweaker(term).to("cpu", torch.float64) for term in self.tensor.terms]
            written = Written(digest, *verify_tensor(self.place, self.tensor, tweakers, digest, worker.reader))
            self.draft.advance(self.tensor.nbytes)
        self.draft.record(self.shard, self.tensor.name, written)

    def drop(self) -> None:
        """Leave it to the disk."""
        self.draft.open_shard(self.shard).drop(self.tensor.name)


@dataclass(frozen=True)
class TakeOverJob:
    """Look whether an earlier run has written a tensor."""

    output: Output
    verify: bool
    source: None = None
    is_finished: bool = False

    def run(self, worker: Worker) -> None:
        """Look."""
        self.output.take_over(self.verify, worker)


@dataclass(frozen=True)
class TensorJob:
    """Everything that is made of one tensor of the base, in one pass over it, or two."""

    source: TensorInfo
    outputs: Sequence[Output]
    verify: bool

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has done it all."""
        return all(output.taken_over for output in self.outputs)

    def run(self, worker: Worker) -> None:
        """Write and check it."""
        todo = [output for output in self.outputs if not output.taken_over]
        if copies := [output for output in todo if output.tensor.is_copy]:
            # not copy_file_range: the hash needs the bytes anyway, so they are read once for both
            for chunk in worker.reader.chunks(self.source):
                worker.check_stopped()
                for output in copies:
                    output.put(chunk)
        if updated := [output for output in todo if output.tensor.terms]:
            _write_updated(self.source, updated, worker)
        for output in todo:
            if not output.tensor.terms and not output.tensor.is_copy:
                _write_unchanged(output, worker)
        for output in todo:
            output.end(self.verify, worker)
        worker.leave_behind(todo)


@dataclass(frozen=True)
class SavedJob:
    """A tensor that the adapter replaces whole."""

    output: Output
    verify: bool
    source: None = None

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has done it."""
        return self.output.taken_over

    def run(self, worker: Worker) -> None:
        """Write and check it."""
        _write_unchanged(self.output, worker)
        self.output.end(self.verify, worker)
        worker.leave_behind([self.output])


@dataclass(frozen=True)
class FileJob:
    """A shard that is, byte for byte, a file which exists already.

    Attributes:
        source: the first tensor in it.
        tensors: where each tensor lies in that file, in the order of `outputs`.
        share: link to the file instead of copying it, if that is possible.
    """

    source: TensorInfo
    tensors: Sequence[TensorInfo]
    outputs: Sequence[Output]
    share: bool
    verify: bool

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has done it all."""
        return all(output.taken_over for output in self.outputs)

    def run(self, worker: Worker) -> None:
        """Copy or link the file, and check it."""
        target = self.outputs[0].place.file
        target.unlink(missing_ok=True)
        try:
            copy_file(self.source.file, target, self.share)
        except SourceError as error:
            raise CheckpointError(f"{self.source.file}: cannot be read ({error}); check the disk") from None
        for info, output in zip(self.tensors, self.outputs, strict=True):
            worker.check_stopped()
            output.draft.advance(info.nbytes)
            output.record(worker.reader.hash(info), self.verify, worker)

    @staticmethod
    def places(tensors: Sequence[TensorInfo], target: Path) -> list[TensorInfo]:
        """Where the tensors will lie in the copy."""
        return [replace(info, file=target) for info in tensors]


def _write_updated(source: TensorInfo, outputs: Sequence[Output], worker: Worker) -> None:
    """`W0 + Σ f(W0; θ)` for each output."""
    updates = [
        [
            Update(output.draft.plan.tweaker(term), source.shape[1], EVALUATION_DTYPE, worker.device)
            for term in output.tensor.terms
        ]
        for output in outputs
    ]
    first = [update for several in updates for update in several if update.needs_pass]
    if first:
        for start, w0 in worker.wide_blocks(source):
            for update in first:
                update.see(w0, start)
        for update in first:
            update.settle()
    for start, w0 in worker.wide_blocks(source):
        for output, several in zip(outputs, updates, strict=True):
            block = w0 if output is outputs[-1] else worker.copy_of(w0)
            merged = merge_rows(block, several, start)
            output.put(_finite(worker.rounded(merged, FLOAT_DTYPES[output.tensor.dtype]), output.tensor))


def _write_unchanged(output: Output, worker: Worker) -> None:
    for block in unchanged_blocks(output.tensor, output.draft.plan, worker.reader):
        worker.check_stopped()
        output.put(block)


def unchanged_blocks(tensor: TensorPlan, plan: Plan, reader: TensorReader) -> Iterator[Tensor]:
    """A tensor of the base or of the adapter that is written in another dtype, in blocks of rows.

    Raises `NonFiniteError` when the numbers do not fit the dtype.
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
    cast = numbers.to(FLOAT_DTYPES[tensor.dtype]).contiguous()
    return cast if not all_finite(numbers) else _finite(cast, tensor)  # an Inf of the base stays one


def _finite(merged: Tensor, tensor: TensorPlan) -> Tensor:
    if not all_finite(merged):
        cure = "; write --dtype bf16 or fp32" if tensor.dtype == "F16" else "; is this the base it was trained on?"
        raise NonFiniteError(
            f"{tensor.name}: merged weights do not fit {tensor.dtype} (NaN, or larger than "
            f"{torch.finfo(merged.dtype).max:g}){cure}"
        )
    return merged
