"""What survives a restart: which names there are, which version each stands for, and copies of θ.

    FOLDER/variants.json      the records
    FOLDER/theta/DIGEST/      θ as it was when it got that digest, so that a name can go back to it
    FOLDER/lock               held by the server that uses the folder

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
    """What is known of a name.

    Attributes:
        source: what it is called in the roots.
        digest: the version it stands for.
        previous: versions it stood for before, the latest first.
        seen: the source's files when they were looked at last.
        pinned: its weights stay on the host.
        hidden: it was unregistered, though it is in the roots.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    digest: str | None = None
    previous: list[str] = []
    seen: State = ()
    pinned: bool = False
    hidden: bool = False


class Records(BaseModel):
    """variants.json.

    Attributes:
        base: fingerprint of the base that the digests are of.
        active: name that an operator has activated last.
        variants: name -> what is known.
    """

    model_config = ConfigDict(extra="forbid")

    base: str
    active: str | None = None
    variants: dict[str, Record] = {}


class VariantStore:
    """The folder, for one process.

    Args:
        folder: made if it is not there.

    Raises `OptionError` when another server uses it.
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
                f"another server uses {folder}; stop it, or give this one a --state of its own"
            ) from None

    def load(self, fingerprint: str) -> Records:
        """The records; empty ones if there are none, or if they are of another base.

        Raises `OptionError` when they are damaged.
        """
        path = self.folder / "variants.json"
        if not path.exists():
            return Records(base=fingerprint)
        try:
            records = Records.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            reason = " ".join(str(error).split())
            raise OptionError(f"{path} is damaged ({reason}); remove it to start without history") from None
        return records if records.base == fingerprint else Records(base=fingerprint)

    def save(self, records: Records) -> None:
        """Replace the records, whole or not at all."""
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
        """A copy of an adapter, a folder or a file; to be kept or thrown away."""
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
        """Keep a copy as the θ of a version; False, without the copy, if θ of that version is kept already."""
        temporary = copy if copy.is_dir() else copy.parent
        kept = self.folder / "theta" / digest
        try:
            temporary.rename(kept)
        except OSError:
            if not kept.is_dir():
                raise
            shutil.rmtree(temporary, ignore_errors=True)  # kept for another name, or from before
            return False
        return True

    def discard(self, copy: Path) -> None:
        """Throw a copy away."""
        shutil.rmtree(copy if copy.is_dir() else copy.parent, ignore_errors=True)

    def theta(self, digest: str) -> Path | None:
        """The θ of a version, if it is kept."""
        kept = self.folder / "theta" / digest
        if not kept.is_dir():
            return None
        files = list(kept.iterdir())
        return files[0] if len(files) == 1 and files[0].suffix in _WEIGHTS else kept

    def forget(self, digests: Iterable[str]) -> None:
        """Throw the θ of versions away."""
        for digest in digests:
            shutil.rmtree(self.folder / "theta" / digest, ignore_errors=True)

    def keep_only(self, digests: Iterable[str]) -> None:
        """Throw every other θ away, and what a process that was killed has left. For the start."""
        wanted = set(digests)
        for path in (self.folder / "theta").iterdir():
            if path.name not in wanted:
                shutil.rmtree(path, ignore_errors=True)


def all_digests(variants: Mapping[str, Record]) -> set[str]:
    """Every version that some name stands for, or can go back to."""
    return {digest for r in variants.values() for digest in [r.digest, *r.previous] if digest is not None}
