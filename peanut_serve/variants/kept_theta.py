"""Copies of θ between the state folders of servers: another server may have a version that this one never had."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

_DIGEST = re.compile("[0-9a-f]{40}")


def is_digest(text: str) -> bool:
    """Whether a text is the full digest of a version. Nothing else becomes the name of a folder."""
    return _DIGEST.fullmatch(text) is not None


def has_theta(state: Path, digest: str) -> bool:
    """Whether a state folder has θ of a version."""
    return is_digest(digest) and (state / "theta" / digest).is_dir()


def read_theta(state: Path, digest: str) -> dict[str, bytes] | None:
    """θ of a version: the contents of its files by their names. None if a state folder does not have it."""
    if not has_theta(state, digest):
        return None
    return {file.name: file.read_bytes() for file in (state / "theta" / digest).iterdir() if file.is_file()}


def add_theta(state: Path, digest: str, files: Mapping[str, bytes]) -> None:
    """Put θ of a version into the state folder of a running server, unless that has it.

    The server compares the contents with the digest when it uses them; when it starts, it removes those of a version
    that none of its records refers to.

    Raises `OSError`, and `ValueError` for a digest or a file name that could be a path.
    """
    if not is_digest(digest) or any(name in ("", "..") or name != Path(name).name for name in files):
        raise ValueError(f"{digest!r} is not a digest, or {sorted(files)} are not names of files")
    if has_theta(state, digest):
        return
    new = Path(tempfile.mkdtemp(dir=state / "theta", prefix=".new-"))
    try:
        for name, content in files.items():
            (new / name).write_bytes(content)
        new.rename(state / "theta" / digest)
    except OSError:
        if not has_theta(state, digest):  # put there meanwhile
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
