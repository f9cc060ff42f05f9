"""Ray's key-value store, in the memory of a test."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from peanut_serve.ray.fleet import store as module


class Store:
    """Ray's key-value store.

    Attributes:
        between: called before the next new key is taken.
        calls: how many there were.
        fails: whether a call fails, by its number from 0, before or after its work: (number, is_done).
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.between = lambda: None
        self.calls = 0
        self.fails: Callable[[int, bool], bool] = lambda number, is_done: False

    @classmethod
    def instead_of_rays(cls, monkeypatch: pytest.MonkeyPatch) -> "Store":
        """One that `WantedStore` uses from now on."""
        found = cls()
        calls = {"put": found.put, "get": found.get, "del": found.delete, "list": found.keys}
        names = {f"_internal_kv_{name}": found.counted(call) for name, call in calls.items()}
        monkeypatch.setattr(module, "internal_kv", SimpleNamespace(**names))
        return found

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if self.fails(number, False):
                raise RuntimeError("Ray's store is away")
            answer = call(*arguments, **options)
            if self.fails(number, True):
                raise RuntimeError("Ray's store went away")
            return answer

        return counting

    def put(self, key: str, value: str, overwrite: bool, *, namespace: str) -> bool:
        assert not overwrite
        between, self.between = self.between, lambda: None
        between()
        if key in self.values:
            return True
        self.values[key] = value
        return False

    def get(self, key: str, *, namespace: str) -> bytes | None:
        found = self.values.get(key)
        return found.encode() if found else None

    def delete(self, key: str, *, namespace: str) -> None:
        del self.values[key]

    def keys(self, prefix: str, *, namespace: str) -> list[bytes]:
        return [key.encode() for key in self.values if key.startswith(prefix)]
