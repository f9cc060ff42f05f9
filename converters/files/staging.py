"""Output folders that appear whole or not at all: written beside, synced, renamed.

The staging folder is hidden, lies on the same file system, and is locked by the run that writes it. What a
killed run leaves is such a folder; it never has the output's name, and the next run to the same output
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
from converters.files.names import MANIFEST_NAME, MODEL_CONFIG

# room beside the weights: tokenizer, manifest, file system overhead
_SPARE_BYTES = 32 << 20


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that would damage something.

    Raises:
        OutputExistsError: it exists and `overwrite` is not set; or it is not a folder that peanut-merge wrote;
            or it contains one of the `inputs`.
    """
    for path in inputs:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputExistsError(f"{output} contains the input {path}; choose another output")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputExistsError(f"{output} exists; choose another -o, or replace it with --overwrite")
    if output.is_symlink() or not output.is_dir():
        raise OutputExistsError(f"{output} is not a folder; --overwrite replaces only folders peanut-merge wrote")
    if any(output.iterdir()) and not (output / MANIFEST_NAME).is_file():
        raise OutputExistsError(
            f"{output} was not written by peanut-merge (no {MANIFEST_NAME}); remove it yourself, or choose another -o"
        )


def check_space(sizes: Mapping[Path, int]) -> None:
    """Raise `NoSpaceError` unless the disks have room for outputs, path -> bytes, that are written together."""
    needed: Counter[int] = Counter()
    for output, size in sizes.items():
        parent = next(path for path in output.absolute().parents if path.is_dir())
        disk = parent.stat().st_dev
        needed[disk] += size + _SPARE_BYTES - _allocated(_staging_of(output))
        free = shutil.disk_usage(parent).free
        if free < needed[disk]:
            raise NoSpaceError(
                f"{output} needs {size / 1e9:.2f} GB, the disk of {parent} has {free / 1e9:.2f} GB free"
                + (f" for {len(sizes)} outputs" if len(sizes) > 1 else "")
                + "; free some, or choose another -o"
            )


def _staging_of(output: Path) -> Path:
    return output.absolute().with_name(f".{output.name}.peanut-staging")


def _allocated(folder: Path) -> int:
    """Bytes on the disk that an earlier run left: they are written again, or gone on with."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) if folder.is_dir() else 0


@contextmanager
def staged(output: Path, overwrite: bool, keep: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an exception.

    On an exception it is removed, and an existing `output` is as it was. With `keep` it is not, and what a run left
    there before is still in it.

    Raises `OutputBusyError` when another run is writing the same output.
    """
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = _staging_of(output)
    was_there = staging.exists()
    lock = None
    try:
        lock = _lock(staging)
        if not keep:
            empty(staging)
        yield staging
        _sync_tree(staging)
        _publish(staging, output.absolute(), overwrite)
    except BaseException as error:
        if lock is not None and not keep:
            _remove(staging)
        elif lock is None and not (was_there or isinstance(error, OutputBusyError)):
            with suppress(OSError):
                staging.rmdir()  # stopped between making and locking it: it is empty
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(staging: Path) -> int:
    """Create and lock the staging folder; the lock ends with the process, however it ends."""
    while True:
        with suppress(FileExistsError):
            staging.mkdir()
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # its owner renamed it in between
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if staging.exists() and os.path.samestat(os.fstat(descriptor), staging.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputBusyError(f"another run is writing this output (it holds {staging}); wait for it") from None
        os.close(descriptor)


def empty(folder: Path) -> None:
    """Remove what a run left; first the config: a removal that is killed leaves nothing that looks like a model."""
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
        raise OutputExistsError(f"{output} appeared while it was being written; choose another -o")
    else:
        _exchange(staging, output)
        _remove(staging)  # by now the old output
    _sync_directory(output.parent)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(staging: Path, output: Path) -> None:
    """Swap two folders in one step (renameat2(2), RENAME_EXCHANGE), or in two where the system cannot."""
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
