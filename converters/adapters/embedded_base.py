"""Base weights that were saved together with θ, as `torch.save(model.state_dict())` does."""

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from converters.adapters.adapter import Adapter
from converters.adapters.layouts.peft_keys import EMBEDDING_NAMES
from converters.errors import BaseMismatchError, CheckpointError, OptionError
from converters.files.blocks import block_rows
from converters.files.header import FLOAT_DTYPES, TensorSpec
from converters.files.json_files import read_json, write_json
from converters.files.names import SINGLE_FILE
from converters.files.reader import TensorReader
from converters.files.writer import ShardWriter
from converters.models.checkpoint import Checkpoint, open_checkpoint

SELF = "self"  # base='self'

_EMBEDDING = re.compile(rf"(.*\.)?({EMBEDDING_NAMES})\.(weight|bias)")

_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def check_embedded(
    base: Checkpoint, adapters: Sequence[Adapter], pairs: Sequence[tuple[int, str, str]], force: bool
) -> list[str]:
    """Compare base weights that were saved together with θ with the base; returns notes for the user.

    Args:
        base: the base.
        adapters: the adapters.
        pairs: (which adapter, name of the tensor it saved, name in the base).
        force: return a note instead of raising.

    Raises `BaseMismatchError` when they differ by more than a cast to the narrower dtype explains.
    """
    different = []
    with TensorReader() as reader:
        for position, name, base_name in pairs:
            adapter, info = adapters[position], base.tensors[base_name]
            key = adapter.embedded[name]
            if not (adapter.store.dtypes[key].is_floating_point and info.is_float):
                continue
            blocks = reader.row_blocks(info, block_rows(info.row_size))
            same = adapter.store.shapes[key] == info.shape and all(
                _equal(block, part) for block, part in zip(blocks, adapter.store.blocks(key), strict=True)
            )
            if not same:
                different.append((adapter, name))
    if not different:
        return []
    adapter, name = different[0]
    message = (
        f"{len(different)} of the {len(pairs)} base weights saved in {adapter.path} differ from those of "
        f"{base.folder} (the first: {name})"
    )
    if not force:
        remedy = "give that base" + (
            "" if _only_embeddings(adapter) else ", or take the saved weights with base='self'"
        )
        raise BaseMismatchError(
            f"{message}: this is not the base it was trained on, or training changed more than the adapter; {remedy}"
        )
    return [f"forced: {message}"]


def _only_embeddings(adapter: Adapter) -> bool:
    """Whether no more than embeddings of the base were saved along, as PEFT does."""
    return all(_EMBEDDING.fullmatch(name) for name in adapter.embedded)


def _equal(base: Tensor, saved: Tensor) -> bool:
    if base.dtype == saved.dtype:
        return torch.equal(base, saved)
    return torch.equal(base.to(saved.dtype), saved) or torch.equal(base, saved.to(base.dtype))


def open_embedded(adapter: Adapter) -> Checkpoint:
    """The base weights that were saved together with θ, as a checkpoint with the config.json next to them.

    It is written to a temporary folder, which exists as long as the checkpoint object.

    Raises:
        OptionError: the adapter contains no base weights.
        CheckpointError: there is no config.json next to it.
    """
    names = {n: k for n, k in sorted(adapter.embedded.items()) if adapter.store.dtypes[k] in _DTYPE_NAMES}
    if _only_embeddings(adapter):
        found = (
            f"θ and {', '.join(names)}, which PEFT saved along, and no other base weights"
            if names
            else "θ only and no base weights"
        )
        raise OptionError(f"base='{SELF}': {adapter.path} contains {found}; give the base")
    if not (adapter.folder / "config.json").is_file():
        raise CheckpointError(
            f"base='{SELF}': no config.json next to {adapter.path}; copy the base's to it (save_pretrained wrote it, "
            "or model.config.save_pretrained does)"
        )
    holder = tempfile.TemporaryDirectory(prefix="peanut-base-")
    try:
        _write(adapter, names, Path(holder.name) / SELF)
    except OSError as error:
        holder.cleanup()
        raise CheckpointError(
            f"base='{SELF}': the base weights could not be written to {holder.name} ({error}); point TMPDIR to a "
            "disk with enough space"
        ) from None
    return open_checkpoint(Path(holder.name) / SELF, holder=holder)


def _write(adapter: Adapter, names: Mapping[str, str], folder: Path) -> None:
    """Write tensors of the store, name -> key, and the config beside the adapter as a checkpoint."""
    folder.mkdir()
    write_json(folder / "config.json", read_json(adapter.folder / "config.json", "model config"))
    specs = []
    for name, key in names.items():
        dtype, shape = adapter.store.dtypes[key], adapter.store.shapes[key]
        specs.append(TensorSpec(name, _DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize))
    writer = ShardWriter(folder / SINGLE_FILE, specs, {"format": "pt"})
    try:
        for name, key in names.items():
            done = 0
            for block in adapter.store.blocks(key):
                writer.write(name, done, block.contiguous())
                done += block.nbytes
        writer.finish()
    finally:
        writer.close()
