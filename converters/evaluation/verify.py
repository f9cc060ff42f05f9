"""Check written weights against θ and the base."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from converters.errors import VerificationError
from converters.evaluation.precision import ROUNDOFF, roundoff_of
from converters.evaluation.recompute import recompute, sample_places
from converters.files.blocks import block_rows
from converters.files.header import FLOAT_DTYPES, TensorInfo, read_header
from converters.files.reader import TensorReader
from converters.methods.weight_delta import WeightDelta
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan

# what a rounded number may be off beside the roundoff of its evaluation: half a unit in the last place (torch casts
# float64 to 16 bits by way of float32, hence a little more)
_HALF = 0.5 + 2.0**-11


@dataclass(frozen=True)
class Verification:
    """What was checked. Errors are in units of the last place (ulp) of the output dtype.

    Attributes:
        tensors: output tensors whose name, dtype, shape and bytes were checked.
        recomputed: numbers of updated weights that were recomputed in float64.
        max_ulp: largest distance to the float64 value; 0.5 for a number that is rounded once.
    """

    tensors: int
    recomputed: int
    max_ulp: float

    @classmethod
    def of(cls, tensors: int, checks: Iterable[tuple[int, float]]) -> "Verification":
        """From the (numbers recomputed, largest error) of each tensor."""
        checks = list(checks)
        return cls(tensors, sum(count for count, _ in checks), max((ulp for _, ulp in checks), default=0.0))

    def summary(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self)


@dataclass(frozen=True)
class FactorCheck:
    """How well factors were checked.

    Attributes:
        recomputed: numbers of delta weights that were recomputed in float64.
        max_error: largest error of a delta, relative to the largest delta of the same weight.
    """

    recomputed: int
    max_error: float


def check_headers(folder: Path, plan: Plan) -> None:
    """Re-open the shards. Raises `VerificationError` unless they hold the tensors of the plan."""
    written = {info.name: info for shard in plan.shards for info in read_header(folder / shard)[0]}
    wanted = {tensor.name: tensor for tensor in plan.tensors}
    if set(written) != set(wanted):
        raise VerificationError(
            f"tensors are missing from the output, or were not planned: {sorted(set(written) ^ set(wanted))[:3]}"
        )
    for name, info in written.items():
        tensor = wanted[name]
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise VerificationError(
                f"{name} was written as {info.dtype} {info.shape}, expected {tensor.dtype} {tensor.shape}"
            )


def verify_tensor(
    written: TensorInfo,
    tensor: TensorPlan,
    deltas: Sequence[WeightDelta],
    digest: str,
    reader: TensorReader,
) -> tuple[int, float]:
    """Read one tensor of the output back, and recompute a sample of an updated one in float64.

    Args:
        written: where it lies in the output.
        tensor: what it should be.
        deltas: its updates, in float64.
        digest: xxh3_128 of what was written.
        reader: reads both the output and the base.

    Returns: (numbers recomputed, their largest error in ulp).

    Raises `VerificationError` when the bytes are others, or a recomputed number is wrong.
    """
    wrong = f"{tensor.name}: the bytes on disk differ from those that were written; check the disk"
    if not deltas or tensor.source is None:
        if reader.hash(written) != digest:
            raise VerificationError(wrong)
        return 0, 0.0
    rows, columns = sample_places(tensor, deltas)
    found_digest, found = _hash_and_pick(written.as_matrix(tensor.matrix_shape), rows, columns, reader)
    if found_digest != digest:
        raise VerificationError(wrong)
    return check_numbers(found, tensor, rows, columns, deltas, reader)


def _hash_and_pick(info: TensorInfo, rows: Tensor, columns: Tensor, reader: TensorReader) -> tuple[str, Tensor]:
    """The hash of a matrix, and its numbers at `rows` (increasing) and `columns` in float64, in one pass."""
    digest, picked, start = xxhash.xxh3_128(), [], 0
    for block in reader.row_blocks(info, block_rows(info.row_size)):
        digest.update(block.reshape(-1).view(torch.uint8).numpy().data)
        inside = rows[(rows >= start) & (rows < start + block.shape[0])] - start
        part = block if len(inside) == len(block) else block.index_select(0, inside)
        picked.append(part.index_select(1, columns).double())
        start += block.shape[0]
    return digest.hexdigest(), torch.cat(picked)


def check_numbers(
    found: Tensor,
    tensor: TensorPlan,
    rows: Tensor,
    columns: Tensor,
    deltas: Sequence[WeightDelta],
    reader: TensorReader,
) -> tuple[int, float]:
    """Recompute an updated weight at `rows` and `columns`, and compare it with `found`, which it has there.

    What a number depends on (`Reads`) is read from the base, apart from what the merge read.

    Returns: (numbers checked, their largest error in ulp).

    Raises `VerificationError` if one is not the float64 value, rounded once; what was evaluated in float32 may be off
    by its roundoff before (`precision.py`).
    """
    w0, delta, spread = recompute(tensor, rows, columns, deltas, reader)
    reference = w0 + delta
    error = (found - reference).abs()
    unit = _ulp(reference, FLOAT_DTYPES[tensor.dtype])
    wrong = error > _HALF * unit + roundoff_of(deltas, tensor.dtype) * spread
    if bool(wrong.any()):
        worst = int((error / unit).argmax())
        raise VerificationError(
            f"{tensor.name}: {int(wrong.sum())} of {wrong.numel()} recomputed numbers are wrong, for example "
            f"{float(found.reshape(-1)[worst])!r} where {float(reference.reshape(-1)[worst])!r} was expected"
        )
    return error.numel(), float((error / unit).max())


def verify_numbers(
    merged: Tensor, tensor: TensorPlan, deltas: Sequence[WeightDelta], reader: TensorReader
) -> tuple[int, float]:
    """Recompute a sample of an updated weight that is in memory; the rest is as for `check_numbers`."""
    rows, columns = sample_places(tensor, deltas)
    merged, few_rows = merged.view(tensor.matrix_shape), len(rows) < len(columns)
    found = merged[rows][:, columns] if few_rows else merged[:, columns][rows]
    return check_numbers(found.double(), tensor, rows, columns, deltas, reader)


def check_factors(
    up: Tensor,
    down: Tensor,
    tensor: TensorPlan,
    deltas: Sequence[WeightDelta],
    dtype: torch.dtype,
    reader: TensorReader,
) -> tuple[int, float]:
    """Recompute a sample of the sum of updates of one weight in float64, and compare it with `up @ down`.

    Args:
        up, down: factors that were rounded to `dtype`, (out, r) and (r, in), in float64.
        tensor: the weight.
        deltas: its updates, in float64.
        dtype: of the factors.
        reader: reads the base.

    Returns: (numbers recomputed, the largest error relative to the largest delta among them).

    Raises `VerificationError` if an error is larger than rounding each factor once makes it.
    """
    rows, columns = sample_places(tensor, deltas)
    _, delta, spread = recompute(tensor, rows, columns, deltas, reader)
    up, down, tiny = up[rows], down[:, columns], torch.finfo(dtype).smallest_normal
    error = (up @ down - delta).abs()
    rounding = torch.finfo(dtype).eps * ((up.abs() + tiny) @ (down.abs() + tiny))
    if bool((wrong := error > rounding + ROUNDOFF * spread).any()):
        raise VerificationError(f"{tensor.name}: {int(wrong.sum())} of {wrong.numel()} recomputed deltas are wrong")
    return error.numel(), float(error.max() / delta.abs().max().clamp(min=torch.finfo(delta.dtype).tiny))


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at `values`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal)).exponent
    return torch.full_like(values, info.eps).ldexp(exponent - 1)
