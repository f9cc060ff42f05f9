"""θ of a library that stores matrices the other way round, seen as a method wants it."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from converters.adapters.store import ThetaStore
from converters.files.blocks import block_rows


class TransposedStore:
    """A store in which some matrices are transposed when they are read; see `ThetaStore`.

    Args:
        store: the tensors as they are on disk.
        keys: those that are transposed; each has two axes.
    """

    def __init__(self, store: ThetaStore, keys: Collection[str]) -> None:
        self._store, self._transposed = store, frozenset(keys)
        self.shapes = {k: s[::-1] if k in self._transposed else s for k, s in store.shapes.items()}
        self.dtypes = store.dtypes

    def tensor(self, key: str) -> Tensor:
        """See `ThetaStore.tensor`."""
        found = self._store.tensor(key)
        return found.T.contiguous() if key in self._transposed else found

    def blocks(self, key: str) -> Iterator[Tensor]:
        """See `ThetaStore.blocks`."""
        if key not in self._transposed:
            yield from self._store.blocks(key)
            return
        yield from torch.split(self.tensor(key), block_rows(self.shapes[key][1]))

    def check_unchanged(self) -> None:
        """See `ThetaStore.check_unchanged`."""
        self._store.check_unchanged()
