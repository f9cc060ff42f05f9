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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converters.checkpoint import MANIFEST_NAME
from converters.errors import NoSpaceError, OutputExistsError

# room beside the weights: tokenizer, manifest, file system overhead
_SPARE_BYTES = 32 << 20


def check_output(output: Path, overwrite: bool, *inputs: Path) -> None:
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


def check_space(output: Path, size: int) -> None:
    """Raise `NoSpaceError` unless the disk of `output` has room for `size` bytes."""
    parent = next(path for path in output.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size + _SPARE_BYTES:
        raise NoSpaceError(
            f"{output} needs {size / 1e9:.2f} GB, the disk of {parent} has {free / 1e9:.2f} GB free; "
            "free some, or choose another -o"
        )


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an exception.

    On an exception it is removed, and an existing `output` is as it was.

    Raises `OutputExistsError` when another run is writing the same output.
    """
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = output.absolute().with_name(f".{output.name}.peanut-staging")
    lock = _lock(staging)
    try:
        _empty(staging)
        yield staging
        _sync_tree(staging)
        _publish(staging, output.absolute(), overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
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
            raise OutputExistsError(f"another run is writing this output (it holds {staging}); wait for it") from None
        os.close(descriptor)


def _empty(folder: Path) -> None:
    """Remove what a killed run left."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
        shutil.rmtree(staging, ignore_errors=True)  # by now the old output
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
