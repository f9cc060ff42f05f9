"""Putting an exported state into a state folder: what was there is whole until the last rename."""

import filecmp
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from converters.errors import NoSpaceError, OptionError
from peanut_serve.variants.backup.archive import Contents, OpenArchive, opened_archive
from peanut_serve.variants.backup.exporting import export_state
from peanut_serve.variants.state_folder import (
    RECORDS,
    Records,
    VariantStore,
    all_digests,
    read_records,
    set_aside,
    shown_base,
    sync,
)

_STAGING = ".import-"
_ROOM = 64 << 20  # bytes of the disk that are left free


def import_state(archive: Path, folder: Path, replace: bool = False) -> tuple[Contents, Path | None]:
    """Make the state in an archive that of a folder. Records of an older schema are rewritten in this one.

    Args:
        archive: written by `export_state`.
        folder: the state folder; created if it does not exist.
        replace: replace the records that are there, which are exported into the folder first.

    Returns what was imported, and where the earlier state is. Raises `OptionError` if a server uses the folder, if
    it has other records, also of another base, or if the archive is damaged or of a newer version; `NoSpaceError`.
    If it fails, the folder has the state that it had.
    """
    with opened_archive(archive) as opened, _locked(folder) as store:
        present = _present(folder)
        if present is not None and present.base != opened.contents.base:
            raise OptionError(
                f"{folder} has the state of another base (fingerprint {shown_base(present.base)}, "
                f"that of the archive is {shown_base(opened.contents.base)}); give another --state"
            )
        if present is not None and present.variants and not replace:
            raise OptionError(
                f"{folder} has the records of {len(present.variants)} variants; pass --replace to replace them (they "
                "are exported first), or give another --state"
            )
        _check_room(opened, folder)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=_STAGING))
        try:
            opened.read(staging)
            records = _checked(opened, staging)
            kept = _kept(folder) if present is not None else None
            _move_in(store, staging, records)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return opened.contents, kept


@contextmanager
def _locked(folder: Path) -> Iterator[VariantStore]:
    """A state folder that no server uses. One that did not exist is removed again after an error."""
    existed = folder.exists()
    store = VariantStore(folder)
    try:
        for left in folder.glob(f"{_STAGING}*"):  # of a killed import
            shutil.rmtree(left, ignore_errors=True)
        yield store
    except BaseException:
        if not existed:
            for name in ("lock", "theta"):
                with suppress(OSError):
                    path = folder / name
                    path.rmdir() if path.is_dir() else path.unlink()
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        store.close()


def _present(folder: Path) -> Records | None:
    path = folder / RECORDS
    return read_records(path.read_bytes(), path) if path.exists() else None


def _check_room(opened: OpenArchive, folder: Path) -> None:
    needed, free = opened.contents.nbytes + _ROOM, shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpaceError(f"{folder} needs {needed >> 20} MiB for the import, {free >> 20} MiB are free")


def _checked(opened: OpenArchive, staging: Path) -> dict[str, Records]:
    """All records of an archive. Raises `OptionError` if they are not what its list says."""
    paths = [staging / RECORDS, *set_aside(staging)]
    records = {path.name: read_records(path.read_bytes(), opened.file / path.name) for path in paths}
    if records[RECORDS].base != opened.contents.base:
        raise opened.damaged("its list and its records name different bases")
    known = set().union(*(all_digests(one.variants) for one in records.values()))
    if unknown := sorted(opened.contents.thetas - known):
        raise opened.damaged(f"it has a version {unknown[0][:12]} that no record names")
    return records


def _kept(folder: Path) -> Path:
    """Export the present state into the folder."""
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    kept = folder / f"replaced-{moment}.tar"
    export_state(folder, kept)
    return kept


def _move_in(store: VariantStore, staging: Path, records: dict[str, Records]) -> None:
    """Move θ in, which nothing refers to yet; then the records, those of the base last."""
    for copy in sorted((staging / "theta").iterdir()) if (staging / "theta").is_dir() else ():
        if not _is_same(copy, store.folder / "theta" / copy.name):
            store.keep(copy, copy.name)
    for name in sorted(records.keys() - {RECORDS}):
        store.save(records[name], name)
    store.save(records[RECORDS])
    sync(store.folder)


def _is_same(copy: Path, kept: Path) -> bool:
    """Whether the folder of a θ has the same files."""
    names = {path.name for path in copy.iterdir()}
    if not kept.is_dir() or {path.name for path in kept.iterdir()} != names:
        return False
    return not any(filecmp.cmpfiles(copy, kept, names, shallow=False)[1:])
