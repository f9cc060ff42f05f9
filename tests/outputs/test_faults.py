"""What goes wrong around a merge: full disks, bad disks, inputs that change, folders that vanish, a second run.

Nothing is lost, nothing incomplete is left, the base is untouched, and the message says what happened.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import Pair, tiny_llama

from converters import merge, prepare_merge, run_merge
from converters.errors import CheckpointError, OutputError, PeanutError, ThetaError
from converters.files.reader import TensorReader
from converters.files.writer import ShardWriter

pytestmark = pytest.mark.slow  # a process for each fault


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sharded(pair: Pair) -> None:
    """Give the base shards."""
    tiny_llama().from_pretrained(pair.base).save_pretrained(pair.base, max_shard_size="40KB")
    (pair.base / "model.safetensors").unlink()


# Mounts a file system that is too small for the output, by so much more each time. The check of the free space is
# turned off: in real life another program fills the disk after it.
ON_SMALL_DISKS = """
import json, os, subprocess, sys
from pathlib import Path
from converters.api import merging
from converters.outputs.checkpoint import write
from converters.errors import PeanutError
write.check_space = lambda sizes: None
base, adapter, disk, options, limits = sys.argv[1:]
output = Path(disk) / "merged"
for limit in limits.split(","):
    subprocess.run(["mount", "-t", "tmpfs", "-o", limit, "tmpfs", disk], check=True)
    try:
        merging.merge(base, adapter, output, **json.loads(options))
        found = "whole"
    except PeanutError as error:
        found = str(error)
    print(json.dumps([limit, found, sorted(path.name for path in Path(disk).iterdir())]), flush=True)
    subprocess.run(["umount", disk], check=True)
"""


def merge_on_small_disks(pair: Pair, limits: list[str], **options: object) -> list[tuple[str, str, list[str]]]:
    disk = pair.base.parent / "disk"
    disk.mkdir()
    child = [
        sys.executable,
        "-c",
        ON_SMALL_DISKS,
        pair.base,
        pair.adapter,
        disk,
        json.dumps(options),
        ",".join(limits),
    ]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *map(str, child)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_is_full_at_every_stage(pair: Pair, resume: bool) -> None:
    sharded(pair)
    before = content(pair.base), content(pair.adapter)
    limits = [f"size={4096 * pages}" for pages in range(1, 44)] + [f"nr_inodes={count}" for count in range(1, 30)]
    seen = merge_on_small_disks(pair, limits, max_shard_size="base", resume=resume)
    whole = [limit for limit, found, _ in seen if found == "whole"]
    assert {"size=176128", "nr_inodes=29"} <= set(whole)
    failed = 0
    for limit, found, left in seen:
        if found == "whole":
            assert left == ["merged"], limit
            continue
        failed += 1
        assert "merged could not be written: [Errno 28] No space left on device" in found, (limit, found)
        assert "no existing output was changed" in found
        assert left == ([".merged.peanut-staging"] if resume and left else []), limit
    assert failed >= 25
    assert (content(pair.base), content(pair.adapter)) == before


@pytest.fixture
def at_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Do something just before the n-th read of a weight."""
    read, count = TensorReader._read, [0]

    def arrange(number: int, action: Callable[[], object]) -> None:
        count[0] = 0

        def act_and_read(self: TensorReader, *arguments: object) -> torch.Tensor:
            count[0] += 1
            if count[0] == number:
                action()
            return read(self, *arguments)

        monkeypatch.setattr(TensorReader, "_read", act_and_read)

    return arrange


def refused(pair: Pair, error: type[PeanutError], match: str) -> None:
    with pytest.raises(error, match=match):
        merge(pair.base, pair.adapter, pair.output)
    assert sorted(path.name for path in pair.output.parent.iterdir()) == ["adapter", "base"]


READS = range(1, 68, 6)  # a merge of the tiny base makes about 70: fingerprint, two passes, verification


@pytest.mark.parametrize("number", READS)
def test_a_shard_truncated_in_the_middle(pair: Pair, number: int, at_read: Callable[..., None]) -> None:
    sharded(pair)
    shard = sorted(pair.base.glob("*.safetensors"))[-1]
    at_read(number, lambda: os.truncate(shard, shard.stat().st_size // 2))
    refused(pair, CheckpointError, r"truncated while it was read|changed while it was merged")


@pytest.mark.parametrize("number", READS)
def test_a_base_overwritten_in_the_middle(pair: Pair, number: int, at_read: Callable[..., None]) -> None:
    """In place, with other numbers: all shapes stay right."""
    other = pair.base.parent / "other.safetensors"
    torch.manual_seed(5)
    tiny_llama().save_pretrained(pair.base.parent / "other")
    shutil.copy(pair.base.parent / "other" / "model.safetensors", other)
    shutil.rmtree(pair.base.parent / "other")
    data = other.read_bytes()
    other.unlink()
    at_read(number, lambda: (pair.base / "model.safetensors").open("r+b").write(data))
    refused(pair, CheckpointError, r"model.safetensors changed while it was merged; nothing was written")


def test_a_base_replaced_in_the_middle(pair: Pair, at_read: Callable[..., None]) -> None:
    """By a rename, as a download does: what is open is the old file."""
    file = pair.base / "model.safetensors"
    shutil.copy(file, pair.base / "new")
    at_read(40, lambda: (pair.base / "new").rename(file))
    refused(pair, CheckpointError, r"model.safetensors changed while it was merged")


def test_an_adapter_that_changes(pair: Pair, at_read: Callable[..., None]) -> None:
    """In place: truncated for a moment, it would be refused for that if another thread read just then."""
    file = pair.adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = bytes(4)

    def overwrite() -> None:
        with file.open("r+b") as opened:
            opened.write(data)

    at_read(40, overwrite)
    refused(pair, ThetaError, r"adapter_model.safetensors changed while it was merged")


@pytest.mark.parametrize("number", READS)
def test_a_read_error(pair: Pair, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised here: a real one needs a broken disk, see the next test."""
    preadv, count = os.preadv, [0]

    def fail(*arguments: object) -> int:
        count[0] += 1
        if count[0] == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", fail)
    refused(pair, CheckpointError, r"model.safetensors: cannot read .*Input/output error.*check the disk")


@pytest.fixture
def failing_disk(tmp_path: Path) -> tuple[Path, Path]:
    """A mounted file system, and the file its bytes are in."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    yield disk, image
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a loop device")
def test_a_disk_that_breaks(failing_disk: tuple[Path, Path], pair: Pair) -> None:
    """The kernel gives EIO where the weights were."""
    disk, image = failing_disk
    shutil.copytree(pair.base, disk / "base")
    plan = prepare_merge(disk / "base", pair.adapter)
    with (disk / "base" / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.truncate(image, 0)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot read .*Input/output error"):
        run_merge(plan, pair.output)
    assert not pair.output.exists()


@pytest.mark.parametrize("what", ["staging", "parent"])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_folder_is_removed_under_it(
    pair: Pair, what: str, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "merged"
    staging, seen = output.with_name(".merged.peanut-staging"), []
    write = ShardWriter.write

    def remove_and_write(self: ShardWriter, *arguments: object) -> None:
        seen.append(1)
        if len(seen) == count:
            shutil.rmtree(staging if what == "staging" else output.parent)
        write(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", remove_and_write)
    with pytest.raises(OutputError, match=r"merged could not be written: .* was removed while it was being written"):
        merge(pair.base, pair.adapter, output)
    assert not output.exists()


def test_no_permission_to_write(pair: Pair) -> None:
    """In a user namespace, where root's rights over files do not hold."""
    locked = pair.base.parent / "locked"
    locked.mkdir(mode=0o555)
    program = Path(sys.executable).parent / "peanut-merge"
    command = ["unshare", "--user", program, "--base", pair.base, "--adapter", pair.adapter, "-o", locked / "merged"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "merged cannot be written: " in done.stderr
    assert "is read-only for this user; change its rights, or choose another output" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(locked.iterdir()) == []


def test_two_runs_with_the_same_output_at_once(pair: Pair) -> None:
    """One of them is refused, and the other's output is whole."""
    alone = merge(pair.base, pair.adapter, pair.output.with_name("alone"))
    script = """
import sys
from converters.api import merging
from converters.evaluation import verify
from converters.errors import OutputExistsError
print("ready", flush=True)
for line in sys.stdin:
    try:
        merging.merge(*sys.argv[1:4])
        print("wrote", flush=True)
    except OutputExistsError as error:
        print(error, flush=True)
"""
    command = [sys.executable, "-c", script, *map(str, (pair.base, pair.adapter, pair.output))]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        run.stdout.readline()
    for _ in range(20):
        for run in runs:
            run.stdin.write("go\n")
            run.stdin.flush()
        said = sorted(run.stdout.readline().strip() for run in runs)
        assert said[1] == "wrote"
        assert any(
            text in said[0] for text in ("another run is writing this output", "exists; choose", "appeared while")
        )
        assert content(pair.output) == content(alone.output)
        shutil.rmtree(pair.output)
    for run in runs:
        run.communicate(timeout=60)
