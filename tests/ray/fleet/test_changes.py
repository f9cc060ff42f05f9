"""Changes of a fleet when Ray's store fails: none is made and forgotten without a word. The replicas are stubs."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peanut_serve.errors import EngineDownError
from peanut_serve.ray.fleet import changes
from peanut_serve.ray.fleet.changes import Change, FleetChanges
from peanut_serve.ray.fleet.wanted import WantedState
from peanut_serve.web.audit import AuditLog, Caller


class Store:
    """Fails from a call on."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at

    async def newest(self) -> WantedState:
        return self._answer("newest")

    async def change(self, change: Callable[[WantedState], WantedState]) -> WantedState:
        return change(self._answer("change"))

    def _answer(self, call: str) -> WantedState:
        if call == self.fails_at:
            raise EngineDownError("Ray's store does not answer", 5)
        return WantedState()


def make(fails_at: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str], dict[str, Any]]:
    """The error of a reload, what the replicas were asked to do, and the line of the audit log."""
    asked = []

    async def ask_all(_: Any, method: str, *arguments: Any, within: float) -> list[dict[str, Any]]:
        if arguments[0] != "GET":
            asked.append(method)
        return [{"replica": name, "status": 204, "answer": None} for name in "ab"]

    monkeypatch.setattr(changes, "ask_all", ask_all)
    store: Any = Store(fails_at)
    fleet = FleetChanges(None, store, AuditLog(folder / "audit.jsonl"))  # type: ignore[arg-type]
    with pytest.raises(EngineDownError) as error:
        asyncio.run(fleet.make(Change("reload", "v1", Caller())))
    return str(error.value), asked, json.loads((folder / "audit.jsonl").read_text())


def test_a_change_that_could_not_be_remembered_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, asked, line = make("newest", tmp_path, monkeypatch)
    assert (error, asked) == ("Ray's store does not answer", [])
    assert (line["outcome"], line["replicas"]) == ("refused", [])


def test_a_change_that_was_made_and_then_not_remembered_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, asked, line = make("change", tmp_path, monkeypatch)
    assert error == (
        "reload of v1 was made at a, b, and could not be remembered (Ray's store does not answer): "
        "replicas that start later will not have it; do it again"
    )
    assert asked == ["call_admin"]
    assert line["outcome"] == "failed"
    assert [one["replica"] for one in line["replicas"]] == ["a", "b"]
