"""Check written weights against θ and the base, before they are published."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from converters.errors import VerificationError
from converters.evaluation import block_rows, factors_from
from converters.plan import Plan
from converters.tensor_file import FLOAT_DTYPES, TensorInfo, TensorReader, read_header
from converters.tensor_plan import TensorPlan
from converters.tweaker import Orientation, Tweaker

_SAMPLES = 8  # columns, or rows, of each updated weight
# what a rounded number may be off: half a unit in the last place (torch casts float64 to 16 bits by way of
# float32, hence a little more), and the roundoff of a float64 evaluation
_HALF = 0.5 + 2.0**-11
_ROUNDOFF = 2.0**-44


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

    def summary(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self)


def verify_output(
    folder: Path, plan: Plan, hashes: dict[str, str], reader: TensorReader, advance: Callable[[int], None]
) -> Verification:
    """Re-open the output and hold it against the plan, the hashes, θ and the base.

    Raises `VerificationError` naming the first tensor that is not as it should be.
    """
    written = {info.name: info for shard in plan.shards for info in read_header(folder / shard)[0]}
    wanted = {tensor.name: tensor for tensor in plan.tensors}
    if set(written) != set(wanted):
        raise VerificationError(f"the output lacks or has too many tensors: {sorted(set(written) ^ set(wanted))[:3]}")
    recomputed = 0
    max_ulp = 0.0
    for name, info in written.items():
        tensor = wanted[name]
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise VerificationError(
                f"{name} was written as {info.dtype} {info.shape}, wanted {tensor.dtype} {tensor.shape}"
            )
        if _hash(info, reader, advance) != hashes[name]:
            raise VerificationError(f"{name}: the bytes on the disk are not those that were written; check the disk")
        if tensor.terms and tensor.source is not None:
            tweakers = [plan.tweaker(term).to("cpu", torch.float64) for term in tensor.terms]
            count, ulp = _check_sample(tensor, tensor.source, info, tweakers, reader)
            recomputed, max_ulp = recomputed + count, max(max_ulp, ulp)
    return Verification(len(written), recomputed, max_ulp)


def _hash(info: TensorInfo, reader: TensorReader, advance: Callable[[int], None]) -> str:
    digest = xxhash.xxh3_128()
    for piece in reader.chunks(info):
        digest.update(piece.numpy().data)
        advance(piece.nbytes)
    return digest.hexdigest()


def _check_sample(
    tensor: TensorPlan, source: TensorInfo, info: TensorInfo, tweakers: list[Tweaker], reader: TensorReader
) -> tuple[int, float]:
    """Recompute a sample in float64: (numbers checked, largest error in ulp).

    One value of h depends on a whole column of W0 in the columns orientation and on a whole row in the rows
    orientation: the sample is whole columns, or whole rows, or where a sum needs both, where some of each cross.
    """
    kinds = {tweaker.orientation for tweaker in tweakers}
    rows = _pick(source.shape[0], sampled=Orientation.ROWS in kinds)
    columns = _pick(source.shape[1], sampled=Orientation.ROWS not in kinds or Orientation.COLUMNS in kinds)
    w0_rows = _rows(source, rows, reader) if Orientation.ROWS in kinds else None
    w0_columns = _columns(source, columns, reader) if w0_rows is None or Orientation.COLUMNS in kinds else None
    reference = w0_columns[rows] if w0_columns is not None else w0_rows[:, columns]  # type: ignore[index]
    spread = reference.abs()
    for tweaker in tweakers:
        delta, magnitude = _delta_at(tweaker, w0_rows, w0_columns, rows, columns)
        reference, spread = reference + delta, spread + magnitude
    found = _rows(info, rows, reader)[:, columns] if w0_rows is not None else _columns(info, columns, reader)
    error = (found - reference).abs()
    unit = _ulp(reference, FLOAT_DTYPES[tensor.dtype])
    wrong = error > _HALF * unit + _ROUNDOFF * spread
    if bool(wrong.any()):
        worst = int((error / unit).argmax())
        raise VerificationError(
            f"{tensor.name}: {int(wrong.sum())} of {wrong.numel()} recomputed numbers are wrong, for example "
            f"{float(found.reshape(-1)[worst])!r} where {float(reference.reshape(-1)[worst])!r} was wanted"
        )
    return error.numel(), float((error / unit).max())


def _delta_at(
    tweaker: Tweaker, w0_rows: Tensor | None, w0_columns: Tensor | None, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """f at some rows and columns, and the sum of magnitudes it was added up from; both (rows, columns)."""
    if tweaker.orientation is Orientation.FREE:
        up, down = tweaker.hidden(tweaker.b[rows]), tweaker.a[:, columns]
    elif tweaker.orientation is Orientation.COLUMNS and w0_columns is not None:
        up, down = tweaker.b[rows], tweaker.hidden(tweaker.a @ w0_columns)
    elif w0_rows is not None:
        up, down = tweaker.hidden(tweaker.a @ w0_rows.T).T, tweaker.b[columns].T
    else:
        raise ValueError("the sample lacks what the tweaker reads")
    return factors_from(tweaker, up, down).delta(), abs(tweaker.scaling) * (up.abs() @ down.abs())


def _pick(size: int, sampled: bool) -> Tensor:
    """Indices: all, or some that are evenly spread."""
    return torch.linspace(0, size - 1, min(_SAMPLES, size)).long() if sampled else torch.arange(size)


def _rows(info: TensorInfo, picked: Tensor, reader: TensorReader) -> Tensor:
    return torch.stack([reader.row(info, int(row)).double() for row in picked])


def _columns(info: TensorInfo, picked: Tensor, reader: TensorReader) -> Tensor:
    blocks: Iterator[Tensor] = reader.row_blocks(info, block_rows(info.row_size))
    return torch.cat([block.index_select(1, picked).double() for block in blocks])


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at `values`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal)).exponent
    return torch.full_like(values, info.eps).ldexp(exponent - 1)
