"""The list of names: read off the event loop, once for all that ask at the same time, whatever happens to folders."""

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from peanut_serve.variants import listing
from peanut_serve.variants.listing import Listing
from peanut_serve.variants.roots import AdapterRoots


class CountedRoots:
    """Roots that note the threads in which they are read."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def names(self) -> list[str]:
        self.threads.append(threading.current_thread())
        return [f"name-{len(self.threads)}"]


def test_the_folders_are_read_in_a_thread_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = CountedRoots()
    names = Listing(roots)  # type: ignore[arg-type]

    async def ask() -> list[list[str]]:
        return await asyncio.gather(*(names.names() for _ in range(10)))

    async def test() -> None:
        assert await ask() == [["name-1"]] * 10
        assert await ask() == [["name-1"]] * 10
        names.renew()
        assert await names.names() == names.latest == ["name-2"]
        monkeypatch.setattr(listing, "_SECONDS", 0.0)
        await asyncio.sleep(0.01)
        assert await names.names() == ["name-3"]

    asyncio.run(test())
    assert threading.main_thread() not in roots.threads


def test_folders_that_come_and_go(tmp_path: Path) -> None:
    stable, roots, is_over = tmp_path / "stable", AdapterRoots([tmp_path]), threading.Event()
    stable.mkdir()
    (stable / "adapter_model.safetensors").touch()

    def disturb() -> None:
        while not is_over.is_set():
            folder = tmp_path / "comes-and-goes"
            folder.mkdir()
            (folder / "adapter_model.safetensors").touch()
            shutil.rmtree(folder)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(2000):
            assert set(roots.names()) - {"comes-and-goes"} == {"stable"}
    finally:
        is_over.set()
        thread.join(10)
