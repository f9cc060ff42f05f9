"""Verifying a written output later: whatever its format, by the manifest beside it."""

from pathlib import Path

from converters.errors import CheckpointError
from converters.outputs.base import OpenInputs, Progress, Shown
from converters.outputs.manifest import read_manifest
from converters.outputs.table import FORMATS


def verify_output(folder: Path, full: OpenInputs | None, progress: Progress) -> Shown:
    """Compare an output with its manifest, and show what was compared.

    Args:
        folder: the output.
        full: opens its base and adapters, to recompute everything from them; None to compare with the manifest alone.
        progress: where to report.

    Raises:
        CheckpointError: this toolkit did not write the folder, or a newer version did, or it is damaged.
        OptionError: `full` was given for a format that cannot be recomputed.
        VerificationError: something is missing, or not what was written.
    """
    manifest = read_manifest(folder)
    name = manifest.get("format", "merged")
    if name not in FORMATS:
        raise CheckpointError(
            f"{folder} is in the format {name!r}, which this version does not know (it knows {', '.join(FORMATS)}); "
            f"{manifest.get('generator', 'a newer version')} wrote it: verify it with that version or a newer one"
        )
    return FORMATS[name].load().verify(folder, manifest, full, progress)
