"""Checking a merged folder again, at any time: by its manifest alone, or against θ and the base."""

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
from converters.files.hashing import hash_file
from converters.files.header import TensorInfo
from converters.files.json_files import read_json
from converters.files.names import MANIFEST_NAME
from converters.files.reader import TensorReader
from converters.methods.weight_delta import Reads
from converters.models.checkpoint import Checkpoint, open_checkpoint
from converters.outputs.manifest import build_manifest
from converters.plans.merge import Plan, plan_merge
from converters.plans.tensor import TensorPlan

_NUMBERS = 1 << 22  # recomputed at a time


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a merged folder. Raises `CheckpointError` if this toolkit did not write the folder."""
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; wanted a folder that peanut-merge wrote")
    manifest = read_json(folder / MANIFEST_NAME, "manifest")
    if not isinstance(manifest.get("tensors"), dict):
        raise CheckpointError(f"{folder / MANIFEST_NAME}: no tensors in it; it is damaged")
    return manifest


def check_files(folder: Path) -> dict[str, str] | None:
    """Hold the files of an ONNX export against its manifest; returns them with their hashes, None if it is no export.

    Raises:
        CheckpointError: this toolkit did not write the folder.
        VerificationError: a file is missing, or its bytes changed.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; wanted a folder that peanut-merge wrote")
    manifest = read_json(folder / MANIFEST_NAME, "manifest")
    if manifest.get("format") != "onnx":
        return None
    files: dict[str, str] = manifest["files"]
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise VerificationError(f"{folder}: {name} is missing")
        if hash_file(folder / name) != digest:
            raise VerificationError(f"{folder}: {name} changed since it was written; export again")
    return files


def open_merged(folder: Path) -> Checkpoint:
    """Open a merged folder. Raises `CheckpointError` if it is none, or no whole checkpoint any more."""
    read_manifest(folder)
    return open_checkpoint(folder)


def plan_again(folder: Path, base: Checkpoint, adapters: Sequence[Weighted]) -> Plan:
    """The plan that the folder should be the result of, with the options its manifest tells.

    Raises `BaseMismatchError` if the base or an adapter is not the one it was merged from; and as `plan_merge`.
    """
    manifest = read_manifest(folder)
    fingerprint = manifest["base"]["fingerprint"]
    if base.fingerprint != fingerprint:
        raise BaseMismatchError(
            f"{folder} was merged from a base with fingerprint {fingerprint}, {base.folder} has {base.fingerprint}"
        )
    wanted = [(entry["digest"], entry["weight"]) for entry in manifest["adapters"]]
    given = [(weighted.adapter.digest, weighted.weight) for weighted in adapters]
    if wanted != given:
        told, found = (
            ", ".join(f"{weight:g} times {digest[:12]}" for digest, weight in pairs) for pairs in (wanted, given)
        )
        raise BaseMismatchError(f"{folder} was merged with adapters of digest {told}; given are {found}")
    options = manifest["options"]
    return plan_merge(
        base, adapters, dtype=options["dtype"], max_shard_size=options["max_shard_size"], labels=options["labels"],
        force_base=True,
    )  # fmt: skip


def check_hashes(folder: Path, advance: Callable[[int], None] = lambda size: None) -> Checkpoint:
    """Hold every tensor of a merged folder against its manifest; `advance` is told of bytes read.

    Raises:
        CheckpointError: it is not such a folder, or no whole checkpoint any more.
        VerificationError: a tensor is missing, extra, of another dtype or shape, or its bytes changed.
    """
    found = open_merged(folder)
    wanted = read_manifest(folder)["tensors"]
    if odd := sorted(set(wanted) ^ set(found.tensors)):
        raise VerificationError(f"{folder}: {odd[0]} is {'missing' if odd[0] in wanted else 'not in the manifest'}")
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
    return found


def is_finished(output: Path, plan: Plan) -> bool:
    """Whether `output` is, byte for byte, what carrying out `plan` would write."""
    try:
        manifest = read_manifest(output)
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
    """Recompute every number of a merged folder from θ and the base, in float64; `advance` is told of bytes.

    Raises `VerificationError` naming the first tensor with a wrong number.
    """
    found = open_checkpoint(output).tensors
    if odd := sorted({tensor.name for tensor in plan.tensors} ^ set(found)):
        raise VerificationError(f"{output}: {odd[0]} is in one of the output and its plan, but not in both")
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
    reads, info = {delta.reads for delta in deltas}, info.as_matrix
    out, width = tensor.matrix_shape
    split_rows = Reads.ROWS in reads and Reads.WHOLE not in reads
    rows = torch.split(torch.arange(out), max(1, _NUMBERS // width)) if split_rows else [torch.arange(out)]
    by_columns = reads != {Reads.ROWS} and Reads.WHOLE not in reads
    columns = torch.split(torch.arange(width), max(1, _NUMBERS // out)) if by_columns else [torch.arange(width)]
    for some_columns in columns:
        read = read_columns(info, some_columns, reader) if by_columns else None
        for some_rows in rows:
            found = read[some_rows] if read is not None else read_rows(info, some_rows, reader)
            yield check_numbers(found, tensor, some_rows, some_columns, deltas, base_reader)


def _compare(
    tensor: TensorPlan, info: TensorInfo, plan: Plan, reader: TensorReader, base_reader: TensorReader
) -> None:
    """Hold a tensor without updates against the base or the adapter."""
    if tensor.is_copy and tensor.source is not None:
        same = reader.hash(info) == base_reader.hash(tensor.source)
    else:
        wanted = unchanged_blocks(tensor, plan, base_reader)
        blocks = reader.row_blocks(info, block_rows(info.row_size))
        same = all(_equal(a, b) for a, b in zip(wanted, blocks, strict=True))
    if not same:
        whence = f"the adapter's {tensor.saved}" if tensor.source is None else f"{tensor.source.name} of the base"
        raise VerificationError(f"{tensor.name} is not {whence}; merge again")


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # NaN equals itself
