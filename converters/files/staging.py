"""Atomic output folders: written next to the output, synced, then renamed; or inside it, where it has to stay.

The staging folder is hidden, is on the same file system, and is locked by the run that writes it. A killed run
leaves only its staging folder, which never has the name of the output; the next run with the same output
removes it.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from converters.errors import NoSpaceError, OutputBusyError, OutputExistsError
from converters.files.inside import discard_half, move_out, sync
from converters.files.names import MODEL_CONFIG
from converters.files.places import Place, find_place, staging_of
from converters.files.sizes import size_text

# space needed besides the weights: tokenizer, manifest, file system overhead
_SPARE_BYTES = 32 << 20


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that would overwrite files it must not touch.

    Raises:
        OutputExistsError: the output exists, is not an empty folder, and `overwrite` is not set; it is not a folder
            that peanut-merge wrote; or it contains one of the `inputs`.
        OutputError: nothing can be written there.
    """
    for path in inputs:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputExistsError(f"{output} contains the input {path}; choose another output")
    find_place(output, overwrite)


def check_space(sizes: Mapping[Path, int]) -> None:
    """Raise `NoSpaceError` if the disks lack space for these outputs, path -> bytes, written at the same time."""
    needed: Counter[int] = Counter()
    for output, size in sizes.items():
        # an output that exists may be a mount point, and then is on another disk than its parent
        parent = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
        disk = parent.stat().st_dev
        needed[disk] += size + _SPARE_BYTES - _allocated(output)
        free = shutil.disk_usage(parent).free
        if free < needed[disk]:
            wanted = size_text(max(size, _SPARE_BYTES))
            raise NoSpaceError(
                f"{output} needs {wanted}, but the disk of {parent} has {size_text(free)} free"
                + (f" for {len(sizes)} outputs" if len(sizes) > 1 else "")
                + "; free some space or choose another output"
            )


def _allocated(output: Path) -> int:
    """Disk usage of an earlier run's leftovers, which will be overwritten or reused."""
    left = [folder for place in (Place.NEW, Place.FILL) if (folder := staging_of(output, place)).is_dir()]
    return sum(path.lstat().st_blocks * 512 for folder in left for path in folder.rglob("*"))


@contextmanager
def staged(output: Path, overwrite: bool, keep: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an exception.

    On an exception the folder is removed, and an existing `output` is not changed. With `keep`, the folder is not
    removed, and it still contains what an earlier run left in it.

    Raises:
        OutputBusyError: another run is writing the same output.
        OutputError: what `find_place` raises.
    """
    place = find_place(output, overwrite)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = staging_of(output, place)
    was_there = staging.exists()
    lock = None
    try:
        lock = _lock(staging)
        if place.is_inside:
            discard_half(staging, output)
        if not keep:
            empty(staging)
        yield staging
        _sync_tree(staging)
        if place.is_inside:
            move_out(staging, output.absolute(), overwrite=place is Place.REFILL)
        else:
            _publish(staging, output.absolute(), overwrite)
    except BaseException as error:
        if lock is not None and not keep:
            _remove(staging)
        elif lock is None and not (was_there or isinstance(error, OutputBusyError)):
            with suppress(OSError):
                staging.rmdir()  # interrupted between creating and locking it, so it is empty
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(staging: Path) -> int:
    """Create and lock the staging folder; the lock is released when the process ends for any reason."""
    while True:
        with suppress(FileExistsError):
            staging.mkdir()
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # its owner renamed it in the meantime
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if staging.exists() and os.path.samestat(os.fstat(descriptor), staging.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputBusyError(
                f"another run is writing this output (it has locked {staging}); wait for it"
            ) from None
        os.close(descriptor)


def empty(folder: Path) -> None:
    """Empty a folder, config first, so that an interrupted removal does not leave what looks like a model."""
    (folder / MODEL_CONFIG).unlink(missing_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove(folder: Path) -> None:
    with suppress(OSError):
        empty(folder)
        folder.rmdir()


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(staging: Path, output: Path, overwrite: bool) -> None:
    if not output.exists():
        staging.rename(output)
    elif not overwrite:
        raise OutputExistsError(f"{output} appeared while it was being written; choose another output")
    else:
        _exchange(staging, output)
        _remove(staging)  # now the old output
    sync(output.parent)


def _exchange(staging: Path, output: Path) -> None:
    """Swap two folders atomically (renameat2(2), RENAME_EXCHANGE), or in several renames if unsupported."""
    at_cwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(at_cwd, os.fsencode(staging), at_cwd, os.fsencode(output), rename_exchange)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(output))
    aside = staging.with_name(f"{staging.name}.old")
    output.rename(aside)
    try:
        staging.rename(output)
    except OSError:
        aside.rename(output)
        raise
    aside.rename(staging)
