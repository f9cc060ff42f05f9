"""Which tensor of the checkpoint a tensor in a loader shows: both have one storage."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class NamedStorages:
    """Names of tensors by their storage, as long as that is theirs: memory that was freed gets another owner.

    Attributes:
        latest: the name that was added last.
    """

    def __init__(self) -> None:
        self.latest = ""
        self._names: dict[int, tuple[Any, str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor."""
        storage = tensor.untyped_storage()
        reference: Any = StorageWeakRef
        self._names[storage.data_ptr()] = reference(storage), name
        self.latest = name

    def name_of(self, view: Tensor) -> str | None:
        """The name of the tensor that a view shows, if it is one of them."""
        key = view.untyped_storage().data_ptr()
        if (found := self._names.get(key)) is None:
            return None
        owner, name = found
        if owner.expired():
            del self._names[key]
            return None
        return name
