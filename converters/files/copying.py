"""Copying bytes between files without passing them through Python: reflinks, hard links, copy_file_range(2)."""

import ctypes
import errno
import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_STEP = 16 << 20  # bytes per call, so that a copy can be interrupted
_FICLONE = 0x40049409  # ioctl(2): share all blocks of a file, copy on write
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # sync_file_range(2)

# copy_file_range is not possible here (two file systems, an old kernel), or does not report which side failed
_FALL_BACK = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO)

_libc = ctypes.CDLL(None, use_errno=True)


class SourceError(OSError):
    """The source of a copy could not be read or ended early."""


def copy_range(source: int, source_offset: int, target: int, target_offset: int, size: int) -> None:
    """Copy bytes from one open file to another.

    Raises `SourceError` if reading failed, and any other `OSError` if writing failed.
    """
    while size:
        step = min(size, _STEP)
        try:
            if not hasattr(os, "copy_file_range"):
                raise OSError(errno.ENOSYS, "no copy_file_range")
            done = os.copy_file_range(source, target, step, source_offset, target_offset)
        except OSError as error:
            if error.errno not in _FALL_BACK:
                raise
            done = _read_and_write(source, source_offset, target, target_offset, min(step, 1 << 20))
        if done == 0:
            raise SourceError(errno.EIO, "the file ended early: it was truncated while it was read")
        start_writeback(target, target_offset, done)
        source_offset, target_offset, size = source_offset + done, target_offset + done, size - done


def _read_and_write(source: int, source_offset: int, target: int, target_offset: int, size: int) -> int:
    try:
        data = memoryview(os.pread(source, size, source_offset))
    except OSError as error:
        raise SourceError(error.errno, error.strerror) from None
    write_at(target, data, target_offset)
    return len(data)


def write_at(target: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        done = os.pwrite(target, data, offset)
        data, offset = data[done:], offset + done


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Start writing a range to disk in the background, so that the final sync has less to do."""
    _sync_range(descriptor, offset, size, _WRITE)


def drop_written(descriptor: int, offset: int, size: int) -> None:
    """Wait until a range is on disk, then drop it from the page cache.

    Otherwise the output would evict pages that are worth keeping, those of its own base first.
    """
    _sync_range(descriptor, offset, size, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def _sync_range(descriptor: int, offset: int, size: int, flags: int) -> None:
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(flags))


def copy_file(source: Path, target: Path, share: bool = False) -> None:
    """Copy `source` to `target`, which must not exist, in the cheapest way available.

    This is a reflink if the file system supports them. Otherwise, with `share`, it is a hard link: both names then
    refer to one file, and writing to either changes both. If neither is possible (two disks), the bytes are copied.

    Raises the same errors as `copy_range`.
    """
    source = source.resolve()
    try:
        reading = os.open(source, os.O_RDONLY)
    except OSError as error:
        raise SourceError(error.errno, error.strerror) from None
    try:
        if share and not _can_reflink(reading, target):
            with suppress(OSError):
                os.link(source, target)
                return
        writing = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if not _reflink(reading, writing):
                copy_range(reading, 0, writing, 0, os.fstat(reading).st_size)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _can_reflink(source: int, target: Path) -> bool:
    """Try a reflink to an unnamed temporary file next to `target`."""
    with tempfile.TemporaryFile(dir=target.parent) as trial:
        return _reflink(source, trial.fileno())
