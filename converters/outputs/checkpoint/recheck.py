"""Checking a merged folder again, at any time: against its manifest alone, or against θ and the base."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.adapters.adapter import Weighted
from converters.errors import BaseMismatchError, CheckpointError, VerificationError
from converters.evaluation.blocks import unchanged_blocks
from converters.evaluation.recompute import read_columns, read_rows
from converters.evaluation.verify import Verification, check_numbers
from converters.files.blocks import block_rows
from converters.files.header import TensorInfo
from converters.files.reader import TensorReader
from converters.methods.weight_delta import Reads
from converters.models.checkpoint import Checkpoint, open_checkpoint
from converters.outputs.checking import check_companions, damaged_manifest
from converters.outputs.manifest import build_manifest, read_manifest
from converters.plans.merge import Plan, plan_merge
from converters.plans.tensor import TensorPlan

_NUMBERS = 1 << 22  # recomputed at a time
_ENTRY = {"file", "dtype", "shape", "xxh3_128"}  # of the manifest, for each tensor


def open_written(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A merged checkpoint and the `tensors` of its manifest.

    Raises:
        CheckpointError: this toolkit did not write the folder, or it is damaged.
        VerificationError: a file that the manifest names is missing.
    """
    tensors = _read_merged_manifest(folder)["tensors"]
    for file in dict.fromkeys(entry["file"] for entry in tensors.values()):
        if not (folder / file).is_file():
            raise VerificationError(f"{folder}: {file} is missing; merge again")
    return open_checkpoint(folder), tensors


def _read_merged_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    tensors = manifest.get("tensors")
    if not isinstance(tensors, dict):
        raise damaged_manifest(folder, "no tensors in it")
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
            raise damaged_manifest(folder, f"the entry of {name} is not complete")
    return manifest


def plan_again(folder: Path, base: Checkpoint, adapters: Sequence[Weighted]) -> Plan:
    """The plan that the folder should be the result of, with the options in its manifest.

    Raises:
        BaseMismatchError: the base or an adapter is not the one it was merged from.
        PeanutError: what `plan_merge` raises.
    """
    manifest = _read_merged_manifest(folder)
    fingerprint = manifest["base"]["fingerprint"]
    if base.fingerprint != fingerprint:
        raise BaseMismatchError(
            f"{folder} was merged from a base with fingerprint {fingerprint}, {base.folder} has {base.fingerprint}"
        )
    wanted = [(entry["digest"], entry["weight"]) for entry in manifest["adapters"]]
    given = [(weighted.adapter.digest, weighted.weight) for weighted in adapters]
    if wanted != given:
        recorded, found = (
            ", ".join(f"{weight:g} times {digest[:12]}" for digest, weight in pairs) for pairs in (wanted, given)
        )
        raise BaseMismatchError(f"{folder} was merged with adapters of digest {recorded}; given are {found}")
    options = manifest["options"]
    return plan_merge(
        base, adapters, dtype=options["dtype"], max_shard_size=options["max_shard_size"], labels=options["labels"],
        force_base=True,
    )  # fmt: skip


def check_hashes(folder: Path, advance: Callable[[int], None] = lambda size: None) -> Checkpoint:
    """Compare every tensor of a merged folder with its manifest; `advance` is called with bytes read.

    Raises:
        CheckpointError: this toolkit did not write the folder, or it is damaged.
        VerificationError: a file or tensor is missing, extra, of another dtype or shape, or its bytes changed.
    """
    found, wanted = open_written(folder)
    if differing := sorted(set(wanted) ^ set(found.tensors)):
        name = differing[0]
        raise VerificationError(f"{folder}: {name} is {'missing' if name in wanted else 'not in the manifest'}")
    with TensorReader() as reader:
        for name, info in found.tensors.items():
            entry = wanted[name]
            if [info.dtype, list(info.shape)] != [entry["dtype"], entry["shape"]]:
                raise VerificationError(
                    f"{folder}: {name} is {info.dtype} {list(info.shape)}, the manifest has {entry['dtype']} "
                    f"{entry['shape']}"
                )
            if reader.hash(info) != entry["xxh3_128"]:
                raise VerificationError(
                    f"{folder}: {name} changed since it was merged ({info.file.name}); merge again"
                )
            advance(info.nbytes)
    check_companions(folder, read_manifest(folder))
    return found


def is_finished(output: Path, plan: Plan) -> bool:
    """Whether `output` is, byte for byte, what carrying out `plan` would write."""
    try:
        manifest = _read_merged_manifest(output)
        hashes = {name: entry["xxh3_128"] for name, entry in manifest["tensors"].items()}
        # what is still on the Hub is known by its commit
        fingerprint = plan.base.fingerprint if plan.base.knows_fingerprint else manifest["base"]["fingerprint"]
        if build_manifest(plan, hashes, fingerprint, manifest["verified"]) != manifest:
            return False
        check_hashes(output)
    except (CheckpointError, VerificationError, KeyError, TypeError):
        return False
    return True


def check_against(output: Path, plan: Plan, advance: Callable[[int], None] = lambda count: None) -> Verification:
    """Recompute every number of a merged folder from θ and the base, in float64; `advance` is called with bytes.

    Raises `VerificationError` naming the first tensor with a wrong number.
    """
    found = open_checkpoint(output).tensors
    if differing := sorted({tensor.name for tensor in plan.tensors} ^ set(found)):
        raise VerificationError(f"{output}: {differing[0]} is in either the output or its plan, but not in both")
    checks = []
    with TensorReader() as reader, TensorReader() as base_reader:
        for tensor in plan.tensors:
            info = found[tensor.name]
            if tensor.terms:
                checks += list(_recompute(tensor, info, plan, reader, base_reader))
            else:
                _compare(tensor, info, plan, reader, base_reader)
            advance(info.nbytes)
    return Verification.of(len(plan.tensors), checks)


def _recompute(
    tensor: TensorPlan, info: TensorInfo, plan: Plan, reader: TensorReader, base_reader: TensorReader
) -> Iterator[tuple[int, float]]:
    """Every number of an updated weight, a part at a time: (numbers, largest error in ulp)."""
    deltas = plan.deltas_of(tensor)
    reads, info = {delta.reads for delta in deltas}, info.as_matrix(tensor.matrix_shape)
    out, width = tensor.matrix_shape
    at_once = bool(reads & {Reads.SHAPE, Reads.WHOLE})
    split_rows = Reads.ROWS in reads and not at_once
    rows = torch.split(torch.arange(out), max(1, _NUMBERS // width)) if split_rows else [torch.arange(out)]
    by_columns = reads != {Reads.ROWS} and not at_once
    columns = torch.split(torch.arange(width), max(1, _NUMBERS // out)) if by_columns else [torch.arange(width)]
    for some_columns in columns:
        read = read_columns(info, some_columns, reader) if by_columns else None
        for some_rows in rows:
            found = read[some_rows] if read is not None else read_rows(info, some_rows, reader)
            yield check_numbers(found, tensor, some_rows, some_columns, deltas, base_reader)


def _compare(
    tensor: TensorPlan, info: TensorInfo, plan: Plan, reader: TensorReader, base_reader: TensorReader
) -> None:
    """Compare a tensor without updates with the base's, or with the adapter's."""
    if tensor.is_copy and tensor.source is not None:
        same = reader.hash(info) == base_reader.hash(tensor.source)
    else:
        wanted = unchanged_blocks(tensor, plan, base_reader)
        blocks = reader.row_blocks(info, block_rows(info.row_size))
        same = all(_equal(a, b) for a, b in zip(wanted, blocks, strict=True))
    if not same:
        origin = f"the adapter's {tensor.saved}" if tensor.source is None else f"{tensor.source.name} of the base"
        raise VerificationError(f"{tensor.name} is not {origin}; merge again")


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # NaN equals itself
