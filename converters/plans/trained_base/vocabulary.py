"""A vocabulary that was resized before the training, where PEFT saved one of the embeddings alone.

With LoRA on the output head, or on the input embedding, PEFT saves the base weight of that one along
(`lm_head.base_layer.weight`; `peft/utils/save_and_load.py`), and not that of the other: its new rows are nowhere.
They were not trained. `resize_token_embeddings` of transformers draws them around the mean of the other rows, with a
standard deviation of less than a ten-thousandth of theirs.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from converters.adapters.adapter import Adapter
from converters.adapters.layouts.peft_keys import EMBEDDING_NAMES
from converters.errors import BaseMismatchError, OptionError
from converters.files.header import TensorInfo
from converters.models import config as model_config
from converters.models.architecture import Architecture
from converters.models.checkpoint import Checkpoint
from converters.models.plain_decoders import class_for
from converters.plans.base_names import BaseNames
from converters.plans.trained_base.added_rows import Addition, mean_row, write_longer
from converters.plans.trained_base.token_names import name_tokens

_NAME = re.compile(rf"(.*\.)?({EMBEDDING_NAMES})\.(weight|bias)")


@dataclass(frozen=True)
class _Saved:
    """An embedding of the base that an adapter has with another number of rows."""

    adapter: Adapter
    key: str
    info: TensorInfo  # of the base

    @property
    def rows(self) -> int:
        """Its number of rows."""
        return self.adapter.store.shapes[self.key][0]

    def new_rows(self) -> Tensor:
        """The rows that the base has not."""
        return self.adapter.store.tensor(self.key)[self.info.shape[0] :]


def resize_vocabulary(base: Checkpoint, adapters: Sequence[Adapter], dtype: str) -> tuple[Checkpoint, list[str]]:
    """The base with the vocabulary that the adapters were trained with; returns it with notes.

    Args:
        base: the base.
        adapters: the adapters.
        dtype: of the merge, see `plan_merge`.

    Raises:
        BaseMismatchError: the adapters have different vocabularies, or different rows for the same tokens.
        OptionError: the base is streamed.
    """
    embeddings = [(adapter, name) for adapter in adapters for name in adapter.embedded if _NAME.fullmatch(name)]
    if all(_fits(base, adapter, name) for adapter, name in embeddings):
        return base, []
    arch = class_for(base, base.architecture)
    names = BaseNames(base, arch, switched=False)
    found = _find_saved(adapters, arch, names, base)
    if not found:
        return base, []
    first = next(iter(found.values()))
    old, new = first.info.shape[0], first.rows
    if base.stream is not None:
        raise OptionError(
            f"stream=True: the vocabulary was resized from {old} to {new} before {first.adapter.path} was trained, "
            "and the embeddings have to be read first; leave out stream="
        )
    replaced = {arch.canonical(name) for adapter in adapters for name in adapter.saved}
    sources = {name: names.find(name) for name in arch.embeddings if name not in replaced}
    wanted = {source for source in sources.values() if source is not None} | set(found)
    unsaved = sorted(source for source in wanted - set(found) if base.tensors[source].shape[0] == old)
    changes: dict[str, Any] = {**base.changes, "vocab_size": [old, new]}
    if new > old:
        rows = {source: one.new_rows() for source, one in found.items()}
        means = {source: mean_row(base.tensors[source]) for source in unsaved}
        rows |= {source: mean.expand(new - old, -1) for source, mean in means.items()}
        longer = write_longer([Addition(base.tensors[s], rows[s], _dtype(base.tensors[s], dtype)) for s in rows])
        tensors, temporary = longer.tensors, longer.holder
        changes["new_rows"] = {s: hashlib.sha256(_bytes(rows[s])).hexdigest() for s in sorted(found)}
        changes |= {"rows_set_to_mean": unsaved} if unsaved else {}
    else:
        tensors, temporary = {s: _shortened(base.tensors[s], new) for s in [*found, *unsaved]}, None
    resized = replace(
        base,
        tensors={name: tensors.get(name, info) for name, info in base.tensors.items()},
        config=model_config.with_vocab_size(base.config, old, new),
        original=base.original or base,
        changes=changes,
        temporary=temporary,
    )
    return resized, _notes(first.adapter, sorted(found), unsaved, old, new)


def _fits(base: Checkpoint, adapter: Adapter, name: str) -> bool:
    """Whether a base weight in an adapter is of the size that the base has, by its name."""
    known = base.tensors.get(name)
    return known is not None and known.shape == adapter.store.shapes[adapter.embedded[name]]


def _find_saved(
    adapters: Sequence[Adapter], arch: Architecture, names: BaseNames, base: Checkpoint
) -> dict[str, _Saved]:
    """Tensor of the base -> what an adapter has for it, for embeddings with another number of rows."""
    found: dict[str, _Saved] = {}
    biases = [name.removesuffix("weight") + "bias" for name in arch.embeddings]
    for adapter in adapters:
        for name, key in adapter.embedded.items():
            canonical = arch.canonical(name)
            source = names.find(canonical) if canonical in (*arch.embeddings, *biases) else None
            shape = adapter.store.shapes[key]
            if source is None or not shape or shape == base.tensors[source].shape:
                continue
            info = base.tensors[source]
            if shape[1:] != info.shape[1:] or not info.is_float:
                continue
            one = _Saved(adapter, key, info)
            found.setdefault(source, one)
            _compare(found[source], one)
            _compare(next(iter(found.values())), one, only_size=True)
    return found


def _compare(first: _Saved, second: _Saved, only_size: bool = False) -> None:
    """Raise `BaseMismatchError` if two embeddings are of different vocabularies."""
    if first.rows != second.rows:
        raise BaseMismatchError(
            f"{first.adapter.path} was trained with a vocabulary of {first.rows}, {second.adapter.path} with one of "
            f"{second.rows} ({second.key}); merge each by itself"
        )
    if not only_size and first is not second and not torch.equal(first.new_rows(), second.new_rows()):
        raise BaseMismatchError(
            f"{first.adapter.path} and {second.adapter.path} were trained with different rows for the tokens that "
            f"{first.info.name} of the base has not; merge each by itself"
        )


def _dtype(info: TensorInfo, dtype: str) -> str:
    """Rows that were trained in float32 are kept so where the output is."""
    return "F32" if dtype == "fp32" and info.dtype != "F64" else info.dtype


def _shortened(info: TensorInfo, rows: int) -> TensorInfo:
    size = info.nbytes // info.shape[0] * rows
    return replace(info, shape=(rows, *info.shape[1:]), nbytes=size)


def _bytes(rows: Tensor) -> bytes:
    return rows.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _notes(adapter: Adapter, saved: Sequence[str], unsaved: Sequence[str], old: int, new: int) -> list[str]:
    note = (
        f"vocabulary: {old} becomes {new}, as it was resized before the training ({', '.join(saved)} in the adapter)"
    )
    if new <= old or not unsaved:
        return [note]
    return [
        note,
        f"WARNING: PEFT saved the new rows of {', '.join(saved)} and not those of {', '.join(unsaved)}: rows {old} "
        f"to {new - 1} of it ({name_tokens(adapter.folder, range(old, new))}) are set to the mean of the others, as "
        "transformers' resize_token_embeddings does up to noise; if they were filled otherwise before the training, "
        "the model does not know these tokens as it was trained to: save it again with save_embedding_layers=True",
    ]
