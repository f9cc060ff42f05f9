"""Check written weights against θ and the base, before they are published."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from converters.errors import VerificationError
from converters.plan import Plan, TensorPlan
from converters.tensor_file import FLOAT_DTYPES, TensorInfo, TensorReader, read_header
from converters.tweaker import Orientation, Tweaker, block_rows

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
        if tensor.module is not None and tensor.source is not None:
            tweaker = plan.adapter.tweaker(tensor.module)
            count, ulp = _check_sample(tensor, tensor.source, info, tweaker, reader)
            recomputed, max_ulp = recomputed + count, max(max_ulp, ulp)
    return Verification(len(written), recomputed, max_ulp)


def _hash(info: TensorInfo, reader: TensorReader, advance: Callable[[int], None]) -> str:
    digest = xxhash.xxh3_128()
    for piece in reader.chunks(info):
        digest.update(piece.numpy().data)
        advance(piece.nbytes)
    return digest.hexdigest()


def _check_sample(
    tensor: TensorPlan, source: TensorInfo, info: TensorInfo, tweaker: Tweaker, reader: TensorReader
) -> tuple[int, float]:
    """Recompute a sample in float64: (numbers checked, largest error in ulp).

    The sample is whole columns in the columns orientation and whole rows in the rows orientation, since that
    is what one value of h depends on.
    """
    axis = 1 if tweaker.orientation is Orientation.COLUMNS else 0
    picked = torch.linspace(0, source.shape[axis] - 1, min(_SAMPLES, source.shape[axis])).long()
    w0 = _select(source, picked, axis, reader)
    found = _select(info, picked, axis, reader)
    exact_tweaker = tweaker.to("cpu", torch.float64)
    lines = w0 if axis == 1 else w0.T  # (d, n): each column is what the tweaker reads at once
    h = exact_tweaker.hidden(exact_tweaker.a @ lines)
    delta = exact_tweaker.scaling * (exact_tweaker.b @ h)
    spread = abs(exact_tweaker.scaling) * (exact_tweaker.b.abs() @ h.abs())
    reference = lines + delta
    lines_found = found if axis == 1 else found.T
    dtype = FLOAT_DTYPES[tensor.dtype]
    error = (lines_found - reference).abs()
    unit = _ulp(reference, dtype)
    wrong = error > _HALF * unit + _ROUNDOFF * (lines.abs() + spread)
    if bool(wrong.any()):
        worst = int((error / unit).argmax())
        raise VerificationError(
            f"{tensor.name}: {int(wrong.sum())} of {wrong.numel()} recomputed numbers are wrong, for example "
            f"{float(lines_found.reshape(-1)[worst])!r} where {float(reference.reshape(-1)[worst])!r} was wanted"
        )
    return error.numel(), float((error / unit).max())


def _select(info: TensorInfo, picked: Tensor, axis: int, reader: TensorReader) -> Tensor:
    """Rows (axis 0) or columns (axis 1) of a weight in float64."""
    if axis == 1:
        blocks: Iterator[Tensor] = reader.row_blocks(info, block_rows(info.row_size))
        return torch.cat([block.index_select(1, picked).double() for block in blocks])
    return torch.stack([reader.row(info, int(row)).double() for row in picked])


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at `values`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal)).exponent
    return torch.full_like(values, info.eps).ldexp(exponent - 1)
