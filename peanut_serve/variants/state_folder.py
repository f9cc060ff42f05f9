"""The state that is kept across restarts: the names, the version each refers to, and copies of θ.

    FOLDER/variants.json           the records
    FOLDER/variants-BASE.json      records that were set aside, because the server was started with another base
    FOLDER/theta/DIGEST/           θ of the version with this digest, so that a name can be rolled back to it
    FOLDER/lock                    locked by the server that uses the folder

θ is small; merged checkpoints are not copied.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from converters.errors import OptionError
from peanut_serve.variants.release import Release
from peanut_serve.variants.roots import State

logger = logging.getLogger("vllm.peanut_serve")

SCHEMA = 3  # of variants.json; raised when an older server would misread it

RECORDS = "variants.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
THETA_FILES = (*_WEIGHTS, ".json")  # endings of the files that are kept of an adapter


class Record(BaseModel):
    """The state of a name.

    Attributes:
        source: its name in the roots.
        digest: of the version it refers to.
        previous: digests of earlier versions, the latest first.
        seen: state of the source's files when they were last read.
        pinned: its weights are kept in host memory.
        hidden: it was unregistered, but is in the roots.
        held: a rollback or a release holds the version until a reload, whatever happens to the files.
        release: the latest release of the name.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    digest: str | None = None
    previous: list[str] = []
    seen: State = ()
    pinned: bool = False
    hidden: bool = False
    held: bool = False
    release: Release | None = None


class Records(BaseModel):
    """The contents of variants.json.

    Attributes:
        schema_version: of the file.
        base: fingerprint of the base that the digests depend on.
        active: name of the variant that an operator activated last.
        variants: name -> record.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    base: str
    active: str | None = None
    variants: dict[str, Record] = {}


class VariantStore:
    """The state folder; one process may use it at a time.

    Args:
        folder: created if it does not exist.

    Attributes:
        keeping: held by the thread that looks whether a θ is kept, and keeps it.

    Raises `OptionError` if another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.keeping = folder, threading.Lock()
        (folder / "theta").mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OptionError(
                f"another server uses {folder}; stop it, or start this one with another --state folder"
            ) from None

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    def load(self, fingerprint: str) -> Records:
        """Read the records of a base; they are empty if there are none. Those of another base are set aside.

        Raises `OptionError` if they are damaged, or were written by a newer version of this package.
        """
        path = self.folder / RECORDS
        found = _read(path)
        if found is not None and found.base == fingerprint:
            return found
        if found is not None:
            aside = self._aside(found.base)
            path.replace(aside)
            logger.warning("%s holds the records of another base; they are kept as %s", path, aside.name)
        earlier = self._aside(fingerprint)
        if (restored := _read(earlier)) is None:
            return Records(base=fingerprint)
        logger.warning("the records of this base were set aside as %s, and are used again", earlier.name)
        earlier.replace(path)
        return restored

    def _aside(self, fingerprint: str) -> Path:
        return self.folder / f"variants-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.json"

    def save(self, records: Records, name: str = RECORDS) -> None:
        """Replace the records, or those that were set aside under a name, atomically."""
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".variants-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(records.model_dump(mode="json"), indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.folder / name)
            sync(self.folder)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def copy_theta(self, source: Path) -> Path:
        """Copy an adapter, a folder or a file; call `keep` or `discard` with the result."""
        into = Path(tempfile.mkdtemp(dir=self.folder / "theta", prefix=".new-"))
        try:
            if not source.is_dir():
                return Path(shutil.copy(source, into))
            for file in source.iterdir():
                if file.is_file() and file.suffix in THETA_FILES:
                    shutil.copy(file, into)
            return into
        except BaseException:
            self.discard(into)
            raise

    def keep(self, copy: Path, digest: str) -> None:
        """Keep a copy as the θ of a version, in place of one that the store has. Returns when it is on the disk."""
        temporary = copy if copy.is_dir() else copy.parent
        kept = self.folder / "theta" / digest
        try:
            for path in [*temporary.iterdir(), temporary]:
                sync(path)
            if kept.exists():
                damaged = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".old-"))
                kept.rename(damaged / "theta")
                temporary.rename(kept)
                shutil.rmtree(damaged, ignore_errors=True)
            else:
                temporary.rename(kept)
            sync(kept.parent)
        except BaseException:
            self.discard(copy)
            raise

    def discard(self, copy: Path) -> None:
        """Remove a copy."""
        shutil.rmtree(copy if copy.is_dir() else copy.parent, ignore_errors=True)

    def theta(self, digest: str) -> Path | None:
        """Path of the θ of a version, if the store has it."""
        kept = self.folder / "theta" / digest
        if not kept.is_dir():
            return None
        files = list(kept.iterdir())
        return files[0] if len(files) == 1 and files[0].suffix in _WEIGHTS else kept

    def forget(self, digests: Iterable[str]) -> None:
        """Remove the θ of versions."""
        for digest in digests:
            shutil.rmtree(self.folder / "theta" / digest, ignore_errors=True)

    def keep_only(self, digests: Iterable[str]) -> None:
        """Remove every other θ, and the temporary copies of a killed process. Called at start-up.

        What records that were set aside refer to is kept as well.
        """
        kept = set(digests)
        for aside in set_aside(self.folder):
            if (records := _read(aside)) is not None:
                kept |= all_digests(records.variants)
        for path in (self.folder / "theta").iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def shown_base(fingerprint: str) -> str:
    """The fingerprint of a base in a message: the beginning of its hash, without the name of the method."""
    return fingerprint.rsplit(":", 1)[-1][:12]


def set_aside(folder: Path) -> Iterator[Path]:
    """The files of a state folder with the records of other bases."""
    return folder.glob("variants-*.json")


def _read(path: Path) -> Records | None:
    """The records in a file; None if there is none."""
    if not path.exists():
        return None
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error) from None
    return read_records(text, path)


def read_records(text: bytes, path: Path) -> Records:
    """The records in the text of a file, in the form of this version: those of an older schema are migrated.

    Raises `OptionError` if they are damaged, or were written by a newer version of this package.
    """
    if (newer := newer_schema(text, path)) is not None:
        raise newer
    try:
        # every field that an older schema did not have has a default
        return Records.model_validate(json.loads(text)).model_copy(update={"schema_version": SCHEMA})
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def newer_schema(text: bytes, path: Path, most: int = SCHEMA, key: str = "schema_version") -> OptionError | None:
    """The error for a file of a newer version of this package, whatever else is in it; None for every other file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = value.get(key, 0) if isinstance(value, dict) else 0
    if not isinstance(found, int) or found <= most:
        return None
    return OptionError(
        f"{path} has {key.replace('_', ' ')} {found}, expected at most {most}: it was written by a newer "
        "peanut-serve; use that one, or another --state folder"
    )


def _damaged(path: Path, error: Exception) -> OptionError:
    reason = " ".join(str(error).split())
    return OptionError(f"{path} is damaged ({reason}); remove it to start without records")


def sync(path: Path) -> None:
    """Write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_digests(variants: Mapping[str, Record]) -> set[str]:
    """Digests of the current and earlier versions of all names."""
    return {digest for r in variants.values() for digest in [r.digest, *r.previous] if digest is not None}
