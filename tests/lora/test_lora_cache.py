"""The disk cache of evaluated adapters: one evaluation, bounded, entries in use are kept, damaged ones rewritten."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.tiny_models import Pair

from converters import prepare_merge
from converters.errors import CheckpointError
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter
from peanut_serve.lora.cache import LoraCache


class Writer:
    """Writes a real adapter, and counts the calls."""

    def __init__(self, pair: Pair, log: Path) -> None:
        self.pair, self.log = pair, log

    def __call__(self, folder: Path) -> None:
        with self.log.open("a") as log:
            log.write(f"{folder.name}\n")
        write_lora_adapter(plan_lora_adapter(prepare_merge(self.pair.base, self.pair.adapter), folder))

    @property
    def count(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def write(pair: Pair, tmp_path: Path) -> Writer:
    return Writer(pair, tmp_path / "log")


@pytest.fixture
def cache(tmp_path: Path) -> LoraCache:
    return LoraCache(tmp_path / "cache", 10**9)


def size_of_one(cache: LoraCache, write: Writer) -> int:
    folder = cache.get("measured", write).folder
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_it_is_written_once(cache: LoraCache, write: Writer) -> None:
    assert cache.get("a", write).folder == cache.get("a", write).folder == cache.folder / "a"
    assert LoraCache(cache.folder, 1).get("a", write).folder == cache.folder / "a"
    assert write.count == 1


GET = """
import sys, time
from pathlib import Path
from converters import prepare_merge
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter
from peanut_serve.lora.cache import LoraCache
base, adapter, cache, seconds = sys.argv[1:]
lease = LoraCache(Path(cache), 10**9).get(
    "a", lambda folder: print("wrote", write_lora_adapter(plan_lora_adapter(prepare_merge(base, adapter), folder)))
)
print("ready", flush=True)
time.sleep(float(seconds))
"""


def getting(pair: Pair, cache: LoraCache, seconds: float = 0) -> "subprocess.Popen[str]":
    """A process that gets the entry `a`, and keeps it in use for some seconds."""
    command = [sys.executable, "-c", GET, pair.base, pair.adapter, cache.folder, str(seconds)]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)


def test_threads_wait_for_one(cache: LoraCache, write: Writer) -> None:
    threads = [threading.Thread(target=cache.get, args=("a", write)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in cache.folder.iterdir()] == ["a"]


@pytest.mark.slow  # three processes import everything
def test_processes_wait_for_one(cache: LoraCache, pair: Pair) -> None:
    outputs = [process.communicate()[0] for process in [getting(pair, cache) for _ in range(3)]]
    assert all("ready" in output for output in outputs)
    assert sum("wrote" in output for output in outputs) == 1


def test_the_least_recently_used_is_removed_first(cache: LoraCache, write: Writer) -> None:
    size = size_of_one(cache, write)
    small = LoraCache(cache.folder, int(size * 3.5))
    for key in ("a", "b"):
        small.get(key, write).release()
    os.utime(small.folder / "a", (1, 1))
    os.utime(small.folder / "measured", (2, 2))
    small.get("c", write).release()
    assert {path.name for path in small.folder.iterdir()} == {"b", "c", "measured"}


def test_entries_in_use_are_kept(cache: LoraCache, write: Writer) -> None:
    tiny = LoraCache(cache.folder, 1)
    leases = [tiny.get(key, write) for key in "abc"]
    assert all(lease.folder.is_dir() for lease in leases)
    leases[1].release()
    leases[1].release()  # releasing twice is allowed
    tiny.shrink()
    assert {path.name for path in tiny.folder.iterdir()} == {"a", "c"}


@pytest.mark.slow  # other processes import everything
def test_use_by_another_process_counts_until_it_exits(cache: LoraCache, pair: Pair) -> None:
    process = getting(pair, cache, seconds=600)
    assert process.stdout is not None
    assert any("ready" in line for line in process.stdout)
    tiny = LoraCache(cache.folder, 1)
    tiny.shrink()
    assert (cache.folder / "a").is_dir()
    process.kill()
    process.wait()
    tiny.shrink()
    assert not (cache.folder / "a").exists()


@pytest.mark.parametrize("damage", ["weights", "truncated", "manifest", "missing"])
def test_a_damaged_entry_is_written_again(cache: LoraCache, write: Writer, damage: str) -> None:
    lease = cache.get("a", write)
    folder = lease.folder
    weights, manifest = folder / "adapter_model.safetensors", folder / "peanut_manifest.json"
    whole = weights.read_bytes()
    if damage == "weights":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncated":
        weights.write_bytes(whole[: len(whole) // 2])
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        weights.unlink()
    with pytest.raises(CheckpointError, match="is damaged and in use; stop its users"):
        cache.get("a", write)
    lease.release()
    assert cache.get("a", write).folder.is_dir()
    assert write.count == 2
    assert weights.read_bytes() == whole


def test_leftovers_of_a_killed_process_are_removed(cache: LoraCache, write: Writer) -> None:
    (cache.folder / ".trash-b-1").mkdir()
    (cache.folder / ".trash-b-1" / "file").touch()
    cache.get("a", write)
    assert [path.name for path in cache.folder.iterdir()] == ["a"]
