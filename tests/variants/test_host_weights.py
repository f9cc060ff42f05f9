"""Weights in anonymous memory: equal to merged files, byte for byte, and immutable once sealed."""

import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from support.server.fake_engine import read
from support.tiny_models import Pair, edit_weights, tiny_llama

from converters import merge
from converters.errors import NonFiniteError
from converters.files.header import TensorSpec
from converters.models.checkpoint import open_checkpoint
from peanut_serve.variants import host_weights
from peanut_serve.variants.host_cache import host_copy
from peanut_serve.variants.host_weights import HostMemoryError, HostWeights
from peanut_serve.variants.opening import VersionOpener, adapter_version, checkpoint_version
from peanut_serve.variants.version import LoadedModel, Version

MakePair = Callable[..., Pair]


def spec(name: str, count: int) -> TensorSpec:
    return TensorSpec(name, "F32", (count,), 4 * count)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def model_of(pair: Pair) -> LoadedModel:
    """Every tensor is loaded, each separately."""
    base = open_checkpoint(pair.base)
    return LoadedModel(base, [[name] for name in base.tensors])


def version_of(pair: Pair) -> Version:
    return adapter_version("adapter", pair.adapter, VersionOpener(model_of(pair), "cpu"))


@pytest.fixture
def sealed() -> Iterator[HostWeights]:
    weights = HostWeights("test", [spec("a", 3), spec("b", 40)])
    weights.put("a", torch.tensor([1.0, 2.0, 3.0]))
    weights.put("b", torch.arange(40.0))
    yield weights.seal()
    weights.close()


def test_sealed_memory_cannot_be_changed(sealed: HostWeights) -> None:
    before, file = read(sealed.tensors.values()), sealed.tensors["a"].file
    descriptor = os.open(file, os.O_RDWR)
    for change in (
        lambda: os.pwrite(descriptor, b"x", 0),
        lambda: os.ftruncate(descriptor, 1),
        lambda: os.ftruncate(descriptor, 1 << 20),
        lambda: os.posix_fallocate(descriptor, 0, 1 << 20),
        lambda: mmap.mmap(descriptor, 0, prot=mmap.PROT_WRITE),
        lambda: file.write_bytes(b""),
    ):
        with pytest.raises(PermissionError):
            change()
    os.close(descriptor)
    assert read(sealed.tensors.values()) == before == {"a": before["a"], "b": torch.arange(40.0).numpy().tobytes()}
    assert file.stat().st_size == sealed.nbytes


def test_another_process_reads_it_by_its_path(sealed: HostWeights) -> None:
    info = sealed.tensors["b"]
    data = subprocess.run(["cat", info.file], capture_output=True, check=True).stdout
    assert data[info.offset : info.offset + info.nbytes] == torch.arange(40.0).numpy().tobytes()
    assert info.offset % 64 == 0


def test_a_mapping_outlives_it(sealed: HostWeights) -> None:
    with sealed.tensors["a"].file.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    before = open_files()
    sealed.close()
    sealed.close()  # closing twice is allowed
    assert open_files() == before - 1
    assert mapped[:12] == torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()


def test_tensors_are_written_in_pieces_by_several_threads() -> None:
    numbers = torch.randn(64, 1000)
    weights = HostWeights("test", [spec(str(i), 1000) for i in range(64)])

    def write(tensors: range) -> None:
        for piece in numbers.split(300, dim=1):
            for i in tensors:
                weights.put(str(i), piece[i])

    threads = [threading.Thread(target=write, args=(range(i, 64, 4),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights.seal()
    found = read(weights.tensors.values())
    assert found == {str(i): row.numpy().tobytes() for i, row in enumerate(numbers)}
    assert weights.digests == {name: xxhash.xxh3_128_hexdigest(data) for name, data in found.items()}
    weights.close()


def test_no_tensors() -> None:
    weights = HostWeights("test", [])
    assert (weights.seal().digests, weights.nbytes) == ({}, 0)
    weights.close()


@pytest.mark.parametrize("pieces", [[3], [40, 3], []])
def test_an_incomplete_tensor(pieces: list[int]) -> None:
    weights = HostWeights("test", [spec("a", 43), spec("b", 1)])
    weights.put("b", torch.zeros(1))
    for piece in pieces:
        weights.put("a", torch.zeros(piece))
    if sum(pieces) == 43:
        with pytest.raises(ValueError, match="a: got more than the expected 172 bytes"):
            weights.put("a", torch.zeros(1))
        weights.seal()
    else:
        with pytest.raises(ValueError, match=f"a: got {4 * sum(pieces)} bytes, expected 172"):
            weights.seal()
    weights.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_equals_the_output_of_a_merge(make_pair: MakePair, dtype: torch.dtype) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "seed": 3}
    pair = make_pair(dtype=dtype, **settings)
    base = read(open_checkpoint(pair.base).tensors.values())
    merged = read(open_checkpoint(merge(pair.base, pair.adapter, pair.output).output).tensors.values())
    differs = {name: data for name, data in merged.items() if data != base[name]}
    assert len(differs) == 5
    for version in (version_of(pair), checkpoint_version("merged", pair.output, model_of(pair))):
        weights = version.evaluate()
        assert read(weights.tensors.values()) == differs
        assert weights.digests == {name: xxhash.xxh3_128_hexdigest(data) for name, data in differs.items()}
        with pytest.raises(PermissionError):
            weights.tensors["lm_head.weight"].file.write_bytes(b"")
        weights.close()


def test_a_copy_of_the_base(pair: Pair) -> None:
    base = open_checkpoint(pair.base)
    names = ["model.norm.weight", "lm_head.weight"]
    copy = host_copy(base, names)
    assert read(copy.tensors.values()) == read(base.tensors[name] for name in names)
    copy.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_that_changes_meanwhile(pair: Pair, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version, before = version_of(pair), open_files()
    change = lambda: edit_weights(pair.base / "model.safetensors", lambda weights: None)  # noqa: E731
    if when == "before":
        change()
    else:
        put = HostWeights.put
        monkeypatch.setattr(HostWeights, "put", lambda *args: (put(*args), change()))
    with pytest.raises(Exception, match="changed while"):
        version.evaluate()
    assert open_files() == before


def test_an_overflow_leaves_nothing(make_pair: MakePair) -> None:
    pair = make_pair(tiny_llama(), torch.float16, scaling=1e9)
    version, before = version_of(pair), open_files()
    with pytest.raises(NonFiniteError):
        version.evaluate()
    assert open_files() == before


def test_insufficient_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    monkeypatch.setattr(host_weights, "available_memory", lambda: 10 << 20)
    message = "v takes 12 MiB of host memory, but only 10 MiB are free; .* --host-cache"
    with pytest.raises(HostMemoryError, match=message):
        HostWeights("v", [spec("a", 3 << 20), spec("b", 12)])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostMemoryError, match="cannot allocate 4 MiB of host memory for v .*; .* --host-cache"):
        HostWeights("v", [spec("a", 1 << 20)])
    assert open_files() == before


def test_available_memory_respects_the_container_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_weights, "_CGROUP", tmp_path)
    monkeypatch.setattr(host_weights, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    assert host_weights.available_memory() == 5000 << 10
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    for limit, free in (("max", 5000 << 10), ("4000000", 2000000), ("90000000", 5000 << 10)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert host_weights.available_memory() == free
