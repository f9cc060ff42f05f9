"""Writing the state of a server to one file, while the server runs or not."""

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from converters import __version__
from converters.errors import OptionError, OutputExistsError
from peanut_serve.variants.backup.archive import LIST, Contents, Entry, is_member
from peanut_serve.variants.state_folder import RECORDS, Records, all_digests, read_records, set_aside

_TRIES = 5


class _ChangedError(Exception):
    """The server changed its state while it was read."""


def export_state(folder: Path, archive: Path, overwrite: bool = False) -> Contents:
    """Write the records of a state folder, and the θ they refer to, to an archive that appears by a rename.

    A running server may use the folder: what is written is the state of one moment.

    Args:
        folder: the state folder.
        archive: the file; only its owner may read it.
        overwrite: replace it if it exists.

    Raises `OptionError` if there is no state or it is damaged, and `OutputExistsError`.
    """
    if archive.exists() and not overwrite:
        raise OutputExistsError(f"{archive} exists; choose another output, or pass --overwrite")
    for _ in range(_TRIES):
        try:
            with _appearing(archive) as file:
                return _write(folder, file)
        except (_ChangedError, FileNotFoundError) as error:
            if not (folder / RECORDS).is_file():
                raise OptionError(
                    f"{folder} has no {RECORDS}; check --state, or the --base that was served"
                ) from error
    raise OptionError(f"the server changes {folder} all the time; try again, or stop it")


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there once it is complete and on the disk."""
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write(folder: Path, output: IO[bytes]) -> Contents:
    kept = _records(folder)
    main = kept[RECORDS][1]
    digests = set().union(*(all_digests(records.variants) for _, records in kept.values()))
    files = {path.relative_to(folder).as_posix(): path for path in _theta_files(folder, digests)}
    entries = {
        name: Entry(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, (data, _) in kept.items()
    }
    entries |= {name: _entry(path) for name, path in files.items()}
    contents = Contents(
        schema_version=main.schema_version,
        package_version=__version__,
        base=main.base,
        written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files=entries,
    )
    with tarfile.open(fileobj=output, mode="w:", format=tarfile.GNU_FORMAT) as tar:
        _add(tar, LIST, contents.model_dump_json(indent=2).encode())
        for name, (data, _) in kept.items():
            _add(tar, name, data)
        for name, path in files.items():
            with path.open("rb") as file:
                _add_file(tar, name, file, entries[name])
    if {name: data for name, (data, _) in _records(folder).items()} != {
        name: data for name, (data, _) in kept.items()
    }:
        raise _ChangedError
    return contents


def _records(folder: Path) -> dict[str, tuple[bytes, Records]]:
    """The files of records: their contents, and what is in them. Raises `OptionError` if one is damaged."""
    paths = [folder / RECORDS, *sorted(set_aside(folder))]
    texts = {path: path.read_bytes() for path in paths}
    return {path.name: (text, read_records(text, path)) for path, text in texts.items()}


def _theta_files(folder: Path, digests: set[str]) -> Iterator[Path]:
    for digest in sorted(digests):
        kept = folder / "theta" / digest
        for path in sorted(kept.iterdir()) if kept.is_dir() else ():
            if path.is_symlink() or not path.is_file() or not is_member(path.relative_to(folder).as_posix()):
                raise OptionError(f"{path} is not a file of a state folder; remove it")
            yield path


def _entry(path: Path) -> Entry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return Entry(size=size, sha256=digest.hexdigest())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    _add_file(tar, name, io.BytesIO(data), Entry(size=len(data), sha256=hashlib.sha256(data).hexdigest()))


def _add_file(tar: tarfile.TarFile, name: str, file: IO[bytes], entry: Entry) -> None:
    """Add a file, without anything of its owner or time."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = entry.size, 0o600
    reading = _Hashed(file)
    try:
        tar.addfile(member, reading)
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # it became shorter
            raise _ChangedError from None
        raise
    if reading.digest.hexdigest() != entry.sha256:
        raise _ChangedError


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data
