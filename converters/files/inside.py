"""Publishing into a folder that has to stay, such as a mount point: it cannot be the target of a rename.

The output is written in a hidden folder inside. Then its files are moved out one by one, and last the one without
which nothing loads the rest. A run that is killed in between leaves a list of what it moved, by which the next run
knows that the folder is not complete.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from converters.errors import OutputExistsError
from converters.files.names import ADAPTER_CONFIG, MANIFEST_NAME, MODEL_CONFIG, NATIVE_CONFIG
from converters.files.places import MOVED, MOVED_AWAY, content, half_moved

# in this order, after everything else
_LAST = (MANIFEST_NAME, NATIVE_CONFIG, ADAPTER_CONFIG, MODEL_CONFIG)


def move_out(staging: Path, output: Path, overwrite: bool) -> None:
    """Move everything in `staging`, which is in `output`, one folder up.

    If that fails, `output` is what it was before.

    Raises `OutputExistsError` if something appeared in `output` meanwhile, and `overwrite` is not set.
    """
    before = content(output)
    if before and not overwrite:
        raise OutputExistsError(
            f"{sorted(before)[0]} appeared in {output} while it was being written; choose another output"
        )
    new = sorted({path.name for path in staging.iterdir()}, key=_order)
    old = staging / MOVED_AWAY
    if before:
        old.mkdir()
    _write_synced(staging / MOVED, "\0".join(sorted({*before, *new})))
    done: list[tuple[Path, Path]] = []
    try:
        for name in sorted(before, key=_order, reverse=True):  # first what makes it a model
            _move(output / name, old / name, done)
        for name in new:
            _move(staging / name, output / name, done)
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        (staging / MOVED).unlink()
        _delete(old)
        raise
    sync(output)
    shutil.rmtree(staging, ignore_errors=True)


def discard_half(staging: Path, output: Path) -> None:
    """Remove what a killed run had moved from `staging` into `output`, what would be loaded first."""
    for name in sorted(half_moved(output), key=_order, reverse=True):
        _delete(output / name)
    _delete(staging / MOVED)
    _delete(staging / MOVED_AWAY)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move(source: Path, target: Path, done: list[tuple[Path, Path]]) -> None:
    source.rename(target)
    done.append((source, target))


def _order(name: str) -> tuple[int, str]:
    return (_LAST.index(name) if name in _LAST else -1, name)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def sync(folder: Path) -> None:
    """Write the entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
