"""The list of names: read off the event loop, once for all that ask at the same time, whatever happens to folders."""

import asyncio
import shutil
import threading
from pathlib import Path

import pytest
from support.server.catalogue_site import Site
from support.tiny_models import Pair

from converters import Adapter, load_adapter
from peanut_serve.variants import listing
from peanut_serve.variants.listing import Listing, judged_by_files
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.roots import AdapterRoots, VariantSource
from peanut_serve.variants.version import VariantKind


class CountedRoots:
    """Roots that note the threads in which they are read."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def names(self) -> list[str]:
        self.threads.append(threading.current_thread())
        return [f"name-{len(self.threads)}"]

    def find(self, name: str) -> None: ...


def never(source: VariantSource) -> VariantKind:
    raise AssertionError(source)


def test_the_folders_are_read_in_a_thread_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = CountedRoots()
    names = Listing(roots, never)  # type: ignore[arg-type]

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


def test_kinds_are_judged_once_for_the_same_files(tmp_path: Path) -> None:
    judged: list[str] = []

    def judge(source: VariantSource) -> VariantKind:
        judged.append(source.name)
        return VariantKind.LORA

    names = Listing(AdapterRoots([tmp_path]), judge)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").touch()

    def look() -> list[str]:
        judged.clear()
        names.renew()
        asyncio.run(names.names())
        return sorted(judged)

    assert names.kind("one") is None
    assert (look(), names.kind("one")) == (["one", "two"], VariantKind.LORA)
    assert look() == []
    (tmp_path / "one.safetensors").write_bytes(b"changed")
    assert look() == ["one"]
    (tmp_path / "two.safetensors").unlink()
    assert (look(), names.kind("two")) == ([], None)


def test_a_list_does_not_wait_for_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_model.safetensors").touch()
    is_read = threading.Event()

    def judge(source: VariantSource) -> VariantKind:
        assert is_read.wait(30)
        return VariantKind.LORA

    async def test() -> None:
        names = Listing(AdapterRoots([tmp_path]), judge)
        for _ in range(2):  # the second one does not judge beside the first
            assert await names.names() == ["one"]
            assert names.kind("one") is None
            names.renew()
        is_read.set()
        while names.kind("one") is None:
            await asyncio.sleep(0.01)
        assert names.kind("one") is VariantKind.LORA

    monkeypatch.setattr(listing, "_SECONDS", 0.05)
    asyncio.run(asyncio.wait_for(test(), 30))


@pytest.mark.parametrize(
    ("limits", "merges", "kind"),
    [
        (None, True, VariantKind.ADAPTER),
        (LoraLimits(64), False, VariantKind.LORA),
        (LoraLimits(64), True, VariantKind.LORA),
        (LoraLimits(1), True, VariantKind.ADAPTER),  # its rank is larger
        (LoraLimits(64, frozenset({"k_proj"})), True, VariantKind.ADAPTER),  # it changes other modules
    ],
)
def test_of_which_kind_an_adapter_will_be(
    pair: Pair, limits: LoraLimits | None, merges: bool, kind: VariantKind
) -> None:
    assert judged_by_files(VariantSource("v1", pair.adapter), limits, merges) is kind


def test_what_the_files_do_not_tell(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for source in (VariantSource("broken", tmp_path / "broken.safetensors"), VariantSource("me/style", "me/style")):
        assert judged_by_files(source, LoraLimits(64), True) is VariantKind.ADAPTER


def test_files_that_are_not_listed_yet_are_not_read_on_the_loop(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A status is told by a coroutine: meanwhile every other request of the server would wait."""
    site = Site(pair, tmp_path)
    site.lora = LoraLimits(64)
    site.start()
    site.names()
    shutil.copytree(site.tasks / "v1", site.tasks / "new")
    readers: list[threading.Thread] = []

    def load(source: Path) -> Adapter:
        readers.append(threading.current_thread())
        return load_adapter(source)

    monkeypatch.setattr(listing, "load_adapter", load)
    kind = lambda: site.catalogue.kind_of(site.catalogue.find("new"))  # noqa: E731
    assert (kind(), readers) == (VariantKind.ADAPTER, [])
    site.names()
    assert (kind(), len(readers)) == (VariantKind.LORA, 1)
    assert threading.main_thread() not in readers
