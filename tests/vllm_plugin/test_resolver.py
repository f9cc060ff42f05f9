"""The resolver on its own; test_serving.py tests it inside vLLM."""

import asyncio
import shutil
import threading
from pathlib import Path

import pytest
from support.tiny_models import Pair
from vllm.lora.request import LoRARequest

from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.exporter import LoraExporter
from peanut_serve.settings.environment import Settings
from peanut_serve.vllm_plugin.lora.identity import distinguish_versions
from peanut_serve.vllm_plugin.lora.resolver import PeanutResolver


def test_a_cancelled_request_releases_its_lease(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluation still completes, for the next request, and the files it wrote can be removed."""
    shutil.copytree(pair.adapter, tmp_path / "tasks" / "one")
    resolver = PeanutResolver(Settings((str(tmp_path / "tasks"),), tmp_path / "cache"))
    export, begun, go_on = LoraExporter.export, threading.Event(), threading.Event()

    def slow(*arguments: object) -> object:
        begun.set()
        go_on.wait()
        return export(*arguments)

    monkeypatch.setattr(LoraExporter, "export", slow)

    async def cancel() -> None:
        asking = asyncio.create_task(resolver.resolve_lora(str(pair.base), "one"))
        await asyncio.to_thread(begun.wait)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go_on.set()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    asyncio.run(cancel())
    assert resolver.served == {}
    assert len(list((tmp_path / "cache").iterdir())) == 1
    LoraCache(tmp_path / "cache", 0).shrink()  # removes what has no lease
    assert list((tmp_path / "cache").iterdir()) == []


def test_versions_with_the_same_name_are_different_adapters() -> None:
    distinguish_versions()
    old, new = LoRARequest("task", 1, "a"), LoRARequest("task", 2, "b")
    assert len({old, new}) == 2
    assert {old} == {LoRARequest("task", 1, "a")}
