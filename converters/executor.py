"""The streaming executor: read, evaluate, write, one block at a time. Nothing holds the model."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.checkpoint import INDEX_FILE, MANIFEST_NAME
from converters.companions import find_companions
from converters.errors import NonFiniteError, OptionError, OutputError
from converters.evaluation import Factors, block_rows, factors_of_blocks, merge_rows
from converters.finite import all_finite
from converters.json_files import write_json
from converters.manifest import build_manifest
from converters.model_card import build_model_card
from converters.plan import Plan
from converters.publish import check_output, check_space, staged
from converters.tensor_file import FLOAT_DTYPES, TensorInfo, TensorReader, TensorWriter
from converters.tensor_plan import TensorPlan
from converters.tweaker import Tweaker
from converters.verify import Verification, verify_output

# W0 and f often cancel. In float32 such a sum can be off by many units in its last place once it is rounded to
# bfloat16; float64 costs a quarter more arithmetic at rank 32 and twice at rank 64, and makes the rounding right
# whatever the blocks and threads
EVALUATION_DTYPE = torch.float64

# told how many more bytes are done; a merge writes `plan.total_size`, its verification reads as many again
Advance = Callable[[int], None]


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        output: the folder.
        plan: what was done to each tensor.
        verification: None if it was turned off.
        seconds: wall time of writing and verifying.
    """

    output: Path
    plan: Plan
    verification: Verification | None
    seconds: float


def check_merge(plan: Plan, output: Path, overwrite: bool) -> None:
    """Everything that can be refused about the output. Raises `OutputError` of one kind or another."""
    check_output(output, overwrite, plan.base.folder, *(weighted.adapter.path for weighted in plan.adapters))
    check_space(output, plan.total_size)


def run_merge(
    plan: Plan,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
    advance: Advance = lambda size: None,
) -> MergeResult:
    """Carry out a plan; see `converters.merge`. `advance` is told of bytes written, then of bytes verified."""
    output = Path(output) if output is not None else plan.default_output
    where = find_device(device)
    check_merge(plan, output, overwrite)
    start = time.perf_counter()
    try:
        with staged(output, overwrite) as staging, TensorReader() as reader:
            hashes = _write_weights(plan, staging, reader, where, advance)
            own = plan.head.path if plan.head.path.is_dir() else None
            for name, source in find_companions(plan.base.folder, own).items():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source, staging / name)
            verification = verify_output(staging, plan, hashes, reader, advance) if verify else None
            verified = verification.summary() if verification else None
            write_json(staging / MANIFEST_NAME, build_manifest(plan, hashes, verified))
            (staging / "README.md").write_text(build_model_card(plan), encoding="utf-8")
            write_json(staging / "config.json", plan.config)  # last: what makes it look like a model
    except OSError as error:
        raise OutputError(f"{output} could not be written: {error}; it is as it was before") from error
    return MergeResult(output, plan, verification, time.perf_counter() - start)


def find_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU. Raises `OptionError` for what is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise OptionError(f"device '{device}' is unknown; wanted auto, cpu, cuda or cuda:N")
    found = torch.device(device)
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise OptionError(f"device '{device}' is not there: this PyTorch sees {count} CUDA devices; use --device cpu")
    return found


def _write_weights(
    plan: Plan, folder: Path, reader: TensorReader, device: torch.device, advance: Advance
) -> dict[str, str]:
    """Write every shard and the index; returns the hash of each tensor."""
    hashes: dict[str, str] = {}
    metadata = {**plan.base.metadata, "format": "pt"}
    for shard, tensors in plan.shards.items():
        with ExitStack() as stack:
            writer = TensorWriter(folder / shard, [tensor.spec for tensor in tensors], metadata)
            stack.callback(writer.close)
            for tensor in tensors:
                writer.begin(tensor.name)
                for piece in merged_pieces(tensor, plan, reader, device):
                    writer.write(piece)
                    advance(piece.nbytes)
                hashes[tensor.name] = writer.end()
            writer.finish()
    if len(plan.shards) > 1:
        weight_map = {tensor.name: shard for shard, tensors in plan.shards.items() for tensor in tensors}
        index: dict[str, Any] = {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)
    return hashes


def merged_pieces(tensor: TensorPlan, plan: Plan, reader: TensorReader, device: torch.device) -> Iterator[Tensor]:
    """One output tensor, in consecutive pieces of rows on the CPU."""
    if tensor.saved is not None:
        saved = plan.head.saved_tensor(tensor.saved)
        for block in torch.split(saved, block_rows(saved[:1].numel())) if saved.dim() else [saved]:
            yield _cast(block, tensor)
        return
    info = tensor.source
    if info is None:
        raise ValueError(f"{tensor.name}: neither saved nor from the base")
    rows = block_rows(info.row_size)
    if tensor.terms:
        terms = [evaluate(plan.tweaker(term), info, reader, EVALUATION_DTYPE, device) for term in tensor.terms]
        start = 0
        for block in reader.row_blocks(info, rows):
            yield _finite(merge_rows(block, terms, start, FLOAT_DTYPES[tensor.dtype]).cpu(), tensor)
            start += block.shape[0]
    elif tensor.dtype == info.dtype:
        yield from reader.chunks(info)
    else:
        for block in reader.row_blocks(info, rows):
            yield _cast(block, tensor)


def evaluate(
    tweaker: Tweaker, info: TensorInfo, reader: TensorReader, dtype: torch.dtype, device: torch.device
) -> Factors:
    """The factors of one update, from a weight on disk."""
    shape = (info.shape[0], info.shape[1])
    return factors_of_blocks(reader.row_blocks(info, block_rows(info.row_size)), shape, tweaker, dtype, device)


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
