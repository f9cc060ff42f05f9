"""Comparing the files of an output with their hashes in its manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, OptionError, VerificationError
from converters.files.hashing import hash_file
from converters.files.names import ADAPTER_CONFIG, MANIFEST_NAME
from converters.outputs.base import OpenInputs, Shown


def damaged_manifest(folder: Path, what: str) -> CheckpointError:
    """The error for a manifest that lacks what its format has."""
    return CheckpointError(f"{folder / MANIFEST_NAME}: {what}; it is damaged, write the output again")


def check_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare the files of an output, name -> xxh3_128, with what they were when they were written.

    Raises `VerificationError` naming the first file that is missing or changed.
    """
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            raise VerificationError(f"{folder}: {name} is missing; write the output again")
        if hash_file(folder / name) != digest:
            raise VerificationError(f"{folder}: {name} changed since it was written; write the output again")


def check_companions(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the files beside the weights with the manifest; one of an earlier version does not name them.

    Raises `VerificationError` naming the first file that is missing or changed.
    """
    files = manifest["companions"].get("files") if isinstance(manifest.get("companions"), Mapping) else {}
    if not isinstance(files, Mapping) or not all(isinstance(one, Mapping) for one in files.values()):
        raise damaged_manifest(folder, "its companions have no files")
    check_files(folder, {name: str(one.get("xxh3_128")) for name, one in files.items()})


def verify_adapter(folder: Path, manifest: Mapping[str, Any], full: OpenInputs | None) -> Shown:
    """Verify a folder whose weights lie in one file, beside an adapter_config.json."""
    if full is not None:
        raise cannot_recompute(folder, "an adapter")
    weights = manifest.get("weights")
    if not isinstance(weights, Mapping) or not {"file", "xxh3_128"} <= weights.keys():
        raise damaged_manifest(folder, "no hash of the weights in it")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise VerificationError(f"{folder}: {ADAPTER_CONFIG} is missing; write the output again")
    files = {str(weights["file"]): str(weights["xxh3_128"])}
    check_files(folder, files)
    check_companions(folder, manifest)
    return show_files(folder, files)


def show_files(folder: Path, files: Mapping[str, str]) -> Shown:
    """That files, name -> hash, are as they were written."""
    found = f"all {len(files)} files are as they were" if len(files) != 1 else f"{next(iter(files))} is as it was"
    return Shown({"output": str(folder), "files": dict(files)}, (f"{folder}: {found} written",))


def cannot_recompute(folder: Path, what: str) -> OptionError:
    """The error for `full` where the format has only hashes to compare with."""
    return OptionError(
        f"full= recomputes merged checkpoints, and {folder} is {what}: it was checked against its base and adapter "
        "when it was written; verify its files without full="
    )
