"""One file with the state of a server: a tar archive whose first member lists the others with sizes and hashes.

Nothing in an archive is trusted before it was compared with that list. Names are those that a state folder has, and
never become other paths; links, devices and sparse members are refused; nothing is compressed, so what is written is
never larger than the archive.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.errors import OptionError
from peanut_serve.variants.state_folder import RECORDS, SCHEMA, THETA_FILES, newer_schema

LIST = "peanut-serve-state.json"
FORMAT = 1  # of the archive

_MOST_LISTED = 64 << 20  # bytes of the list
_CHUNK = 1 << 20
_MOST_READ = max(_MOST_LISTED, _CHUNK)  # at once; the headers of a tar may ask for more
_SUFFIXES = "|".join(re.escape(suffix) for suffix in THETA_FILES)
_MEMBER = re.compile(
    rf"variants(-[0-9a-f]{{16}})?\.json|theta/[0-9a-f]{{40}}/[^/\x00-\x1f\x7f]{{1,200}}({_SUFFIXES})"
)


class Entry(BaseModel):
    """A file of the archive.

    Attributes:
        size: in bytes.
        sha256: of its contents, in hexadecimal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Contents(BaseModel):
    """The list at the beginning of an archive.

    Attributes:
        format: of the archive.
        schema_version: of the records.
        package_version: of the peanut-serve that wrote it; digests of versions depend on it.
        base: fingerprint of the base of the records.
        written: when, in UTC.
        files: path in the state folder -> what it has to be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    schema_version: int = SCHEMA
    package_version: str
    base: str
    written: str
    files: dict[str, Entry]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(entry.size for entry in self.files.values())

    @property
    def thetas(self) -> set[str]:
        """Digests of the versions whose θ it has."""
        return {name.split("/")[1] for name in self.files if name.startswith("theta/")}


def is_member(name: str) -> bool:
    """Whether a state folder may have a file of this name."""
    return _MEMBER.fullmatch(name) is not None


@dataclass(frozen=True)
class OpenArchive:
    """An archive while it is read.

    Attributes:
        file: where it is, for messages.
        contents: its list.
    """

    file: Path
    contents: Contents
    _tar: tarfile.TarFile

    def read(self, into: Path | None = None) -> None:
        """Compare every file with the list, and write it below a folder, unless that is None.

        Raises `OptionError` for a file that is damaged, missing, not in the list, or not a regular one.
        """
        left = dict(self.contents.files)
        for member in self._members():
            entry = left.pop(member.name, None)
            if entry is None:
                raise self.damaged(f"{member.name!r} is not in its list, or there twice")
            if not member.isreg() or member.issparse():
                raise self.damaged(f"{member.name!r} is not a regular file")
            if member.size != entry.size:
                raise self.damaged(f"{member.name} has {member.size} bytes, expected {entry.size}")
            source = self._tar.extractfile(member)
            if source is None or _copy(source, into / member.name if into else None) != entry.sha256:
                raise self.damaged(f"the hash of {member.name} is not the one in its list")
        if left:
            raise self.damaged(f"{min(left)} is missing")

    def _members(self) -> Iterator[tarfile.TarInfo]:
        while (member := self._tar.next()) is not None:
            yield member

    def damaged(self, why: str) -> OptionError:
        """The error for an archive that is not what was exported."""
        return OptionError(f"{self.file} is damaged: {why}; export it again, or use an older archive")


@contextmanager
def opened_archive(file: Path) -> Iterator[OpenArchive]:
    """Open an archive and read its list.

    Raises `OptionError` if it is none, is damaged, or was written by a newer version of this package.
    """
    with file.open("rb") as raw:
        try:
            with tarfile.open(fileobj=_Bounded(raw), mode="r:") as tar:
                yield OpenArchive(file, _contents(file, tar), tar)
        except (tarfile.TarError, EOFError, UnicodeError) as error:
            raise OptionError(f"{file} is not an archive of peanut-serve state export, or is cut ({error})") from None


class _Bounded(io.BufferedIOBase):
    """A file that gives no more at once than an honest archive needs: a header may claim any size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_READ:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _contents(file: Path, tar: tarfile.TarFile) -> Contents:
    first = tar.next()
    if first is None or first.name != LIST or not first.isreg() or first.issparse() or first.size > _MOST_LISTED:
        raise OptionError(f"{file} is not an archive of peanut-serve state export: its first member is not {LIST}")
    listed = tar.extractfile(first)
    text = listed.read(first.size) if listed is not None else b""
    try:
        found = Contents.model_validate_json(text)
    except ValidationError as error:
        if newer := newer_schema(text, file, FORMAT, "format"):
            raise newer from None
        reason = " ".join(str(error).split())
        raise OptionError(f"{file} is damaged: its list is not one ({reason}); export it again") from None
    for newer in (newer_schema(text, file, FORMAT, "format"), newer_schema(text, file)):
        if newer is not None:
            raise newer
    if strange := sorted(name for name in found.files if not is_member(name)):
        raise OptionError(f"{file} lists {strange[0]!r}, which is not a file of a state folder; it is not imported")
    if RECORDS not in found.files:
        raise OptionError(f"{file} is damaged: it has no {RECORDS}; export it again")
    return found


def _copy(source: IO[bytes], target: Path | None) -> str:
    """Hash a file, and write it if there is a target. Returns the sha256."""
    digest = hashlib.sha256()
    if target is None:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
