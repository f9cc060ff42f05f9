"""θ of a library that saves it in two files, seen as one."""

from collections.abc import Iterator

from torch import Tensor

from converters.adapters.store import ThetaStore


class JoinedStore:
    """The tensors of a store, and those of another under a prefix; see `ThetaStore`."""

    def __init__(self, store: ThetaStore, other: ThetaStore, prefix: str) -> None:
        self._stores = {key: (store, key) for key in store.shapes} | {
            prefix + key: (other, key) for key in other.shapes
        }
        self.shapes = {name: one.shapes[key] for name, (one, key) in self._stores.items()}
        self.dtypes = {name: one.dtypes[key] for name, (one, key) in self._stores.items()}
        self._both = (store, other)

    def tensor(self, key: str) -> Tensor:
        """See `ThetaStore.tensor`."""
        store, own = self._stores[key]
        return store.tensor(own)

    def blocks(self, key: str) -> Iterator[Tensor]:
        """See `ThetaStore.blocks`."""
        store, own = self._stores[key]
        yield from store.blocks(own)

    def check_unchanged(self) -> None:
        """See `ThetaStore.check_unchanged`."""
        for store in self._both:
            store.check_unchanged()
