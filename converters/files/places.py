"""What kind of place an output is, and where it is staged. Whatever is wrong with it is said before the work."""

import os
from enum import Enum
from hashlib import sha256
from pathlib import Path

from converters.errors import OutputError, OutputExistsError
from converters.files.names import MANIFEST_NAME

INSIDE = ".peanut-staging"  # staging folder in a folder that is filled
MOVED = ".moved"  # in that: the names that are moved out of it, written before the first is moved
MOVED_AWAY = ".moved-away"  # in that: the earlier output that is replaced
_MOUNTS = Path("/proc/self/mountinfo")
_NOT_CONTENT = {INSIDE, "lost+found"}  # the latter is in the root of every ext4 volume
_NAME_BYTES = 255
_LONGEST_SUFFIX = len(".peanut-staging.old")


class Place(Enum):
    """How an output gets to its place."""

    NEW = "nothing is there: a folder next to it is renamed"
    FILL = "an empty folder, which may be a mount point: files are moved into it"
    EXCHANGE = "an output of this toolkit: a folder next to it takes its name"
    REFILL = "an output of this toolkit in a mount point, or in a folder that nothing can be created next to"

    @property
    def is_inside(self) -> bool:
        """Whether the folder itself stays."""
        return self in (Place.FILL, Place.REFILL)


def find_place(output: Path, overwrite: bool) -> Place:
    """How `output` will get to its place.

    Raises:
        OutputExistsError: something is there that must not be touched, or not without `overwrite`.
        OutputError: the name is too long, or nothing may be written there.
    """
    _refuse_long_names(output)
    if not output.exists() and not output.is_symlink():
        _refuse_read_only(next(path for path in output.absolute().parents if path.exists()), output)
        return Place.NEW
    if output.is_dir() and is_empty(output):
        _refuse_read_only(output, output)
        return Place.FILL
    if not overwrite:
        raise OutputExistsError(f"{output} exists; choose another output, or replace it with overwrite=True")
    if output.is_symlink() or not output.is_dir():
        raise OutputExistsError(f"{output} is not a folder; only folders that peanut-merge wrote can be overwritten")
    if not (output / MANIFEST_NAME).is_file():
        raise OutputExistsError(
            f"{output} was not written by peanut-merge (no {MANIFEST_NAME}); remove it, or choose another output"
        )
    if not is_mount(output) and os.access(output.absolute().parent, os.W_OK | os.X_OK):
        return Place.EXCHANGE
    _refuse_read_only(output, output)
    return Place.REFILL


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty, but for what a killed run left."""
    return not content(folder) - set(half_moved(folder))


def content(folder: Path) -> set[str]:
    """The names in a folder, without the staging folder and what a file system puts there."""
    return {path.name for path in folder.iterdir()} - _NOT_CONTENT


def half_moved(folder: Path) -> list[str]:
    """What a killed run has moved into `folder` of an output that is not complete."""
    staging = folder / INSIDE
    if not (staging / MOVED).is_file() or {path.name for path in staging.iterdir()} <= {MOVED, MOVED_AWAY}:
        return []  # nothing was moved yet, or everything
    if (staging / MOVED_AWAY).is_dir() and not any((staging / MOVED_AWAY).iterdir()):
        return []  # the earlier output is still complete
    return (staging / MOVED).read_text().split("\0")


def is_mount(folder: Path) -> bool:
    """Whether something is mounted at a folder; a bind mount of the same disk, as Docker makes them, as well."""
    if os.path.ismount(folder):
        return True
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    points = {line.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape") for line in lines}
    return os.path.realpath(folder) in points


def staging_of(output: Path, place: Place) -> Path:
    """The folder in which `output` is written. It is hidden, and on the same file system."""
    if place.is_inside:
        return output.absolute() / INSIDE
    name = output.name
    if len(os.fsencode(name)) + 1 + _LONGEST_SUFFIX > _NAME_BYTES:
        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return output.absolute().with_name(f".{name}.peanut-staging")


def _refuse_long_names(output: Path) -> None:
    for name in output.absolute().parts:
        if (size := len(os.fsencode(name))) > _NAME_BYTES:
            raise OutputError(
                f"{name[:40]}... has {size} bytes, but the name of a file or folder has at most {_NAME_BYTES}; "
                "choose a shorter name with output="
            )


def _refuse_read_only(folder: Path, output: Path) -> None:
    """Refuse a folder that is none, or in which nothing may be created."""
    if not folder.is_dir():
        raise OutputError(f"{output} cannot be created: {folder} is a file; choose another output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"{output} cannot be written: {folder} is read-only for this user; change its rights, or choose another "
            "output"
        )
