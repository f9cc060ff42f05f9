"""The jobs of a merge: each writes, and checks, everything that is made of one tensor of the base."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from converters.errors import CheckpointError
from converters.evaluation.blocks import unchanged_blocks, updated_blocks
from converters.evaluation.verify import verify_tensor
from converters.evaluation.worker import Worker
from converters.files.copying import SourceError, copy_file
from converters.files.header import TensorInfo
from converters.outputs.checkpoint.draft import Draft
from converters.outputs.checkpoint.journal import WrittenTensor
from converters.plans.tensor import TensorPlan


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
        written = WrittenTensor(digest)
        if verify:
            plan = self.draft.plan
            deltas = plan.deltas_of(self.tensor)
            written = WrittenTensor(digest, *verify_tensor(self.place, self.tensor, deltas, digest, worker.reader))
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
        worker.defer_drop(todo)


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
        worker.defer_drop([self.output])


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
    merges = [(output.draft.plan, output.tensor) for output in outputs]
    for index, merged in updated_blocks(source, merges, worker):
        outputs[index].put(merged)


def _write_unchanged(output: Output, worker: Worker) -> None:
    for block in unchanged_blocks(output.tensor, output.draft.plan, worker.reader):
        worker.check_stopped()
        output.put(block)
