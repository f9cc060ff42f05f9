"""Whether a base is the one an adapter was trained on: `f(W0; θ)` is only right on that W0."""

import re
from dataclasses import replace
from pathlib import Path

from converters.adapters.adapter import Adapter
from converters.errors import AdapterConfigError, AlreadyMergedError, BaseMismatchError
from converters.files.json_files import read_json, write_json
from converters.files.names import BASE_RECORD
from converters.hub.names import is_hub_id
from converters.hub.twins import are_twins, cached_repository, is_quantized, repository
from converters.models.checkpoint import Checkpoint

# how bases are named that lack what an adapter began with: PiSSA-Llama-2-7b-r128, llama-milora-residual
RESIDUAL_NAME = re.compile(r"pissa|milora|olora|corda|residual", re.IGNORECASE)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_base_record(folder: Path) -> str | None:
    """The base fingerprint recorded beside an adapter, or None.

    Raises `AdapterConfigError` when the record is damaged.
    """
    path = folder / BASE_RECORD
    if not path.exists():
        return None
    fingerprint = read_json(path, "record of the base", AdapterConfigError).get("fingerprint")
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[\w-]+:[0-9a-f]+", fingerprint):
        raise AdapterConfigError(
            f"{path}: '{fingerprint}' is not a valid fingerprint; remove the file, or record the base again"
        )
    return fingerprint


def write_base_record(folder: Path, base: Checkpoint) -> Path:
    """Record `base` beside the adapter in `folder` as the one it was trained on; returns the file."""
    path = folder / BASE_RECORD
    identity = {"name": base.name, "repo_id": base.repo_id, "revision": base.revision}
    write_json(path, {**identity, "fingerprint": base.fingerprint})
    return path


def check_base(base: Checkpoint, adapter: Adapter, force: bool) -> list[str]:
    """Check the base against what the adapter's training recorded; returns notes for the user.

    The fingerprint of a base whose weights are still on the Hub is not known yet: call this again when it is.

    A recorded fingerprint decides. Without one, names are compared: other spellings of the same repository are the
    same base, copies and quantizations of it get a note.

    Unless `force` is set, raises `BaseMismatchError` when a recorded fingerprint or Hub id differs, and
    `AlreadyMergedError` when this toolkit wrote the base and the adapter was not recorded on it.
    """
    remedy = "give that base, or force_base=True if you know they are the same weights"
    recorded = adapter.base_fingerprint
    differs = recorded is not None and base.knows_fingerprint and recorded != base.fingerprint
    if base.is_merged and (recorded is None or differs):
        message = f"{base.folder} was written by peanut-merge: its weights already contain an adapter"
        if not force:
            raise AlreadyMergedError(
                f"{message}, and f(W0; θ) is only right on the W0 it was trained on; give the base that was merged "
                "from, or force_base=True if this adapter was trained on the merged weights"
            )
        return [f"forced: {message}"]
    if differs:
        message = f"the adapter was recorded on a base with fingerprint {recorded}, this one has {base.fingerprint}"
        if not force:
            raise BaseMismatchError(f"{message}; {remedy}")
        return [f"forced: {message}"]
    if adapter.base_name is None or recorded is not None:
        return []  # a fingerprint decides, whatever the names are
    objection, note = _compare_names(base, adapter.base_name, trained_revision(adapter))
    if objection is None:
        return [note] if note is not None else []
    if not force:
        raise BaseMismatchError(f"{objection}; {_advice(adapter.base_name, remedy)}")
    return [f"forced: {objection}"]


def trained_repository(adapter: Adapter) -> str | None:
    """The Hub id of the base that the training recorded; None if it recorded none, or the path of a folder."""
    name = adapter.base_name or ""
    cached = cached_repository(name)
    if cached is not None:
        return cached[0]
    return name if is_hub_id(name) else None


def trained_revision(adapter: Adapter) -> str | None:
    """The revision of the base that the training recorded."""
    cached = cached_repository(adapter.base_name or "")
    return adapter.base_revision or (cached[1] if cached is not None else None)


def _compare_names(base: Checkpoint, trained_on: str, revision: str | None) -> tuple[str | None, str | None]:
    """What speaks against the base, by the names that were recorded; and a note, where nothing does."""
    cached, held = cached_repository(trained_on), cached_repository(str(base.folder.resolve()))
    trained_on = trained_on if cached is None else cached[0]
    if base.repo_id is None and held is not None:
        base = replace(base, repo_id=held[0], revision=held[1])
    rounded = " (quantized, by its name, so θ was trained on rounded weights)" if is_quantized(trained_on) else ""
    short = trained_on.rstrip("/").rsplit("/", 1)[-1]
    if base.repo_id is not None and is_hub_id(trained_on):
        if repository(trained_on) == repository(base.repo_id):
            return None, _other_commit(base, revision)
        message = f"the adapter was trained on {trained_on}{rounded}, the base is {base.repo_id}"
        if not are_twins(trained_on, base.repo_id):
            return message, None
        return None, (
            f"{message}: by their names two copies of one model; names and shapes are checked, its values are taken "
            "for the same"
        )
    if short.lower() == base.name.lower():
        return None, None
    if RESIDUAL_NAME.search(short):
        return (
            f"the adapter was trained on '{trained_on}', by its name a base that lacks what the adapter began "
            f"with, and this is {base.name}"
        ), None
    here = f"the local {base.name}" if base.repo_id is None else base.repo_id
    return None, f"the adapter was trained on '{trained_on}'{rounded}; {here} is taken for the same weights"


def _other_commit(base: Checkpoint, trained_on: str | None) -> str | None:
    """A note, if the base is another commit of its repository than the one that was recorded."""
    if trained_on is None or base.revision in (None, trained_on) or not _COMMIT.fullmatch(trained_on):
        return None
    return f"the adapter was trained on revision {trained_on} of {base.repo_id}, this is {base.revision}"


def _advice(trained_on: str, remedy: str) -> str:
    """What to do about another base: a quantized one is of no use."""
    if not is_quantized(trained_on):
        return remedy
    return remedy.replace("that base", f"the model that {trained_on} was made from, not quantized")
