"""Adapters whose weights are in several files, with an index: `adapter_model-00001-of-00002.safetensors`, ...

The form is transformers' for models (`huggingface_hub.save_torch_state_dict`): `weight_map` of the index says in
which file each tensor is.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from converters.adapters.store import ThetaStore, open_store
from converters.errors import CheckpointError, ThetaError
from converters.files.names import PEFT_WEIGHTS
from converters.models.weight_files import read_weight_map

_INDEX_ENDING = ".index.json"
INDEX_NAMES = tuple(name + _INDEX_ENDING for name in PEFT_WEIGHTS)

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.(safetensors|bin|pt|pth)")


class ShardedStore:
    """θ in several files; each tensor is read from the one that the index names.

    Raises `ThetaError` when a file is missing or damaged, or index and files do not have the same tensors.
    """

    def __init__(self, index: Path) -> None:
        try:
            weight_map = read_weight_map(index)
        except CheckpointError as error:
            raise ThetaError(str(error)) from None
        self._stores: dict[str, ThetaStore] = {}
        for name in sorted(set(weight_map.values())):
            if not (index.parent / name).is_file():
                raise ThetaError(f"{index.parent}: the shard {name} is missing; copy it from where the adapter is")
            self._stores[name] = open_store(index.parent / name)
        self._file_of: dict[str, str] = {}
        for name, store in self._stores.items():
            for key in store.shapes:
                if key in self._file_of:
                    raise ThetaError(f"{index.parent}: {key} is in {self._file_of[key]} and in {name}")
                self._file_of[key] = name
        if wrong := sorted(set(weight_map.items()) ^ set(self._file_of.items())):
            raise ThetaError(
                f"{index.parent}: {index.name} and the shards disagree, for example on {wrong[0][0]}; the download "
                "is incomplete, or files of two adapters were mixed"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for store in self._stores.values():
            self.shapes |= store.shapes
            self.dtypes |= store.dtypes

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._store_of(key).tensor(key)

    def blocks(self, key: str) -> Iterator[Tensor]:
        """One tensor in blocks of rows; a scalar as it is."""
        return self._store_of(key).blocks(key)

    def check_unchanged(self) -> None:
        """Raise `ThetaError` if a file changed since it was opened."""
        for store in self._stores.values():
            store.check_unchanged()

    def _store_of(self, key: str) -> ThetaStore:
        return self._stores[self._file_of[key]]


def find_index(folder: Path) -> Path | None:
    """The index in a folder, if its weights are in several files."""
    return next((folder / name for name in INDEX_NAMES if (folder / name).is_file()), None)


def open_weights(path: Path) -> ThetaStore:
    """Open a file of weights, or all files of an index.

    Raises `ThetaError` if one is damaged, unsafe or missing, or if `path` is one of several shards.
    """
    if path.name.endswith(_INDEX_ENDING):
        return ShardedStore(path)
    shard = _SHARD.fullmatch(path.name)
    if shard is not None and int(shard["count"]) > 1:
        raise ThetaError(
            f"{path} is one of {int(shard['count'])} shards, and has a part of the adapter; give the folder, with "
            f"all shards and their index ({shard['stem']}.<ending>{_INDEX_ENDING})"
        )
    return open_store(path)
