"""Whether a base is the one an adapter was trained on: `f(W0; θ)` is only right on that W0."""

import re
from pathlib import Path

from converters.adapters.adapter import Adapter
from converters.errors import AdapterConfigError, AlreadyMergedError, BaseMismatchError
from converters.files.json_files import read_json, write_json
from converters.files.names import BASE_RECORD
from converters.hub.names import SHORT_NAMES, is_hub_id
from converters.models.checkpoint import Checkpoint

# how repositories of quantized models are named: Llama-3.2-1B-4bit, llama-3-8b-bnb-4bit, gpt-oss-20b-MXFP4-Q8
_QUANTIZED = re.compile(
    r"[-_](\d+[-_]?bit|bnb|awq|gptq|int[48]|fp[48]|mxfp[48]|nvfp4|q[2-8])(?![a-z0-9])", re.IGNORECASE
)

# and of bases that lack what an adapter began with: PiSSA-Llama-2-7b-r128, llama-milora-residual
RESIDUAL_NAME = re.compile(r"pissa|milora|olora|corda|residual", re.IGNORECASE)

# names the Hub used before every model had an owner
_OLD_HUB_NAMES = {new.rsplit("/", 1)[-1].lower(): new for new in SHORT_NAMES.values()}


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
    trained_on = adapter.base_name
    if trained_on is None or recorded is not None:
        return []
    same = _hub_key(trained_on) == _hub_key(base.repo_id or base.name)
    rounded = (
        " (quantized, by its name, so θ was trained on rounded weights)" if _QUANTIZED.search(trained_on) else ""
    )
    if base.repo_id is not None and is_hub_id(trained_on) and not same:
        message = f"the adapter was trained on {trained_on}{rounded}, the base is {base.repo_id}"
        if not force:
            raise BaseMismatchError(f"{message}; {remedy}")
        return [f"forced: {message}"]
    short = trained_on.rstrip("/").rsplit("/", 1)[-1]
    if base.repo_id is None and short.lower() != base.name.lower():
        if RESIDUAL_NAME.search(short):
            message = (
                f"the adapter was trained on '{trained_on}', by its name a base that lacks what the adapter began "
                f"with, and this is {base.name}"
            )
            if not force:
                raise BaseMismatchError(f"{message}; {remedy}")
            return [f"forced: {message}"]
        return [
            f"the adapter was trained on '{trained_on}'{rounded}; the local {base.name} is taken for the same weights"
        ]
    return []


def _hub_key(name: str) -> str:
    return _OLD_HUB_NAMES.get(name.lower(), name).lower()
