"""The state that is kept across restarts: the names, the version each refers to, and copies of θ.

    FOLDER/variants.json      the records
    FOLDER/theta/DIGEST/      θ of the version with this digest, so that a name can be rolled back to it
    FOLDER/lock               locked by the server that uses the folder

θ is small; merged checkpoints are not copied.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from converters.errors import OptionError
from peanut_serve.variants.roots import State

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class Record(BaseModel):
    """The state of a name.

    Attributes:
        source: its name in the roots.
        digest: of the version it refers to.
        previous: digests of earlier versions, the latest first.
        seen: state of the source's files when they were last read.
        pinned: its weights are kept in host memory.
        hidden: it was unregistered, but is in the roots.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    digest: str | None = None
    previous: list[str] = []
    seen: State = ()
    pinned: bool = False
    hidden: bool = False


class Records(BaseModel):
    """The contents of variants.json.

    Attributes:
        base: fingerprint of the base that the digests depend on.
        active: name of the variant that an operator activated last.
        variants: name -> record.
    """

    model_config = ConfigDict(extra="forbid")

    base: str
    active: str | None = None
    variants: dict[str, Record] = {}


class VariantStore:
    """The state folder; one process may use it at a time.

    Args:
        folder: created if it does not exist.

    Raises `OptionError` if another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "theta").mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OptionError(
                f"another server uses {folder}; stop it, or start this one with another --state folder"
            ) from None

    def load(self, fingerprint: str) -> Records:
        """Read the records; they are empty if there are none, or if those found belong to another base.

        Raises `OptionError` if they are damaged.
        """
        path = self.folder / "variants.json"
        if not path.exists():
            return Records(base=fingerprint)
        try:
            records = Records.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            reason = " ".join(str(error).split())
            raise OptionError(f"{path} is damaged ({reason}); remove it to start without records") from None
        return records if records.base == fingerprint else Records(base=fingerprint)

    def save(self, records: Records) -> None:
        """Replace the records atomically."""
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".variants-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(records.model_dump(mode="json"), indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.folder / "variants.json")
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
                if file.is_file() and file.suffix in (*_WEIGHTS, ".json"):
                    shutil.copy(file, into)
            return into
        except BaseException:
            self.discard(into)
            raise

    def keep(self, copy: Path, digest: str) -> bool:
        """Keep a copy as the θ of a version. If the store already has one, discard the copy and return False."""
        temporary = copy if copy.is_dir() else copy.parent
        kept = self.folder / "theta" / digest
        try:
            temporary.rename(kept)
        except OSError:
            if not kept.is_dir():
                raise
            # the store has it for another name, or from an earlier version
            shutil.rmtree(temporary, ignore_errors=True)
            return False
        return True

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
        """Remove every other θ, and the temporary copies of a killed process. Called at start-up."""
        kept = set(digests)
        for path in (self.folder / "theta").iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def all_digests(variants: Mapping[str, Record]) -> set[str]:
    """Digests of the current and earlier versions of all names."""
    return {digest for r in variants.values() for digest in [r.digest, *r.previous] if digest is not None}
