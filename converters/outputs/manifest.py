"""The manifest beside merged weights: what they were made of, and what every tensor is.

`peanut_manifest.json` holds no dates and no paths, so that the same merge gives the same bytes.
"""

import platform
from importlib.metadata import version
from typing import Any

from converters._version import __version__
from converters.adapters.adapter import Weighted
from converters.adapters.facts import settings_of
from converters.hub.names import is_hub_id
from converters.plans.merge import Plan

FORMAT_VERSION = 1


def build_manifest(plan: Plan, hashes: dict[str, str], fingerprint: str, verified: Any) -> dict[str, Any]:
    """The manifest of a merge.

    Args:
        plan: what was done.
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
    }


def provenance(plan: Plan, fingerprint: str) -> dict[str, Any]:
    """The part of the manifest that tells of what something was made."""
    base = plan.base
    return {
        "format_version": FORMAT_VERSION,
        "generator": f"peanut-serve {__version__}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "base": {
            "name": base.name,
            "repo_id": base.repo_id,
            "revision": base.revision,
            "fingerprint": fingerprint,
        },
        "adapters": [_adapter(weighted) for weighted in plan.adapters],
    }


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
