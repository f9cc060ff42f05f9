"""The manifest of an output: the inputs it was made from, and what is in it.

`peanut_manifest.json` holds no dates and no paths, so that the same merge gives the same bytes. Its `format` is the
name of the output's format; a merged checkpoint has none.
"""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters._version import __version__
from converters.adapters.adapter import Weighted
from converters.adapters.facts import settings_of
from converters.errors import CheckpointError
from converters.files.hashing import hash_file
from converters.files.json_files import read_json
from converters.files.names import MANIFEST_NAME
from converters.hub.names import is_hub_id
from converters.plans.merge import Plan

FORMAT_VERSION = 1


def build_manifest(plan: Plan, hashes: dict[str, str], fingerprint: str, verified: Any) -> dict[str, Any]:
    """The manifest of a merged checkpoint.

    Args:
        plan: the merge.
        hashes: xxh3_128 of every output tensor.
        fingerprint: of the base.
        verified: the result of the verification, or None if it was turned off.
    """
    return {
        **provenance(plan, fingerprint),
        "options": dict(plan.options),
        "verified": verified,
        "tensors": {
            tensor.name: {
                "action": tensor.action.value,
                "file": shard,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "xxh3_128": hashes[tensor.name],
                **({"from": tensor.source.name} if tensor.source and tensor.source.name != tensor.name else {}),
                **(
                    {"cast_from": tensor.source.dtype}
                    if tensor.source and tensor.source.dtype != tensor.dtype
                    else {}
                ),
            }
            for shard, tensors in plan.shards.items()
            for tensor in tensors
        },
        "dropped": dict(plan.dropped),
        "companions": plan.companions.facts(),
    }


def provenance(plan: Plan, fingerprint: str) -> dict[str, Any]:
    """The part of every manifest that names the inputs and the versions of the software."""
    base = plan.base
    methods = {theta.method for weighted in plan.adapters for theta in weighted.adapter.modules.values()}
    packages = sorted({package for method in methods for package in method.packages})
    return {
        "format_version": FORMAT_VERSION,
        "generator": f"peanut-serve {__version__}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors", *packages)},
        },
        "base": {
            "name": base.name,
            "repo_id": base.repo_id,
            "revision": base.revision,
            "fingerprint": fingerprint,
            **({"changed_before_training": dict(base.changes)} if base.changes else {}),
        },
        "adapters": [_adapter(weighted) for weighted in plan.adapters],
    }


def weights_entry(file: Path) -> dict[str, str]:
    """The part of an adapter's manifest about its file of weights."""
    return {"file": file.name, "xxh3_128": hash_file(file)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output. Raises `CheckpointError` if this toolkit did not write the folder."""
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; expected a folder that peanut-merge wrote")
    return read_json(folder / MANIFEST_NAME, "manifest")


def _adapter(weighted: Weighted) -> dict[str, Any]:
    adapter = weighted.adapter
    return {
        "name": adapter.name,
        "repo_id": adapter.repo_id,
        "revision": adapter.revision,
        "layout": adapter.layout,
        "digest": adapter.digest,
        "weight": weighted.weight,
        "trained_on": adapter.base_name if is_hub_id(adapter.base_name or "") else None,
        **settings_of(adapter),
    }
