"""The Layout seam: whether a folder or file is in a layout, why, and how it is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.adapters.adapter import Adapter, ModuleTheta, check_theta
from converters.adapters.base_record import read_base_record
from converters.adapters.source import AdapterSource
from converters.adapters.store import ThetaStore
from converters.models.labels import labels_beside


@dataclass(frozen=True)
class Layout:
    """One on-disk convention of θ.

    Attributes:
        name: as `--layout` spells it.
        claims: the evidence that a source is in this layout, or None.
        read: the adapter in a source, from the evidence and a scaling that was given.
        asked_only: never claimed unless the user names it.
    """

    name: str
    claims: Callable[[AdapterSource], str | None]
    read: Callable[[AdapterSource, str, float | None], Adapter]
    asked_only: bool = False


def build_adapter(
    source: AdapterSource,
    layout: str,
    evidence: str,
    modules: Mapping[str, ModuleTheta],
    saved: Mapping[str, str],
    store: ThetaStore | None = None,
    **facts: Any,
) -> Adapter:
    """The adapter of a source whose keys were sorted.

    Args:
        source: where it is.
        layout, evidence, modules, saved: see `Adapter`.
        store: its tensors, where the methods want them otherwise than the source has them.
        facts: further fields of `Adapter`.

    Raises `ThetaError` when θ does not fit itself, or is not finite.
    """
    store = source.store if store is None else store
    return Adapter(
        path=source.path,
        layout=layout,
        evidence=evidence,
        store=store,
        modules=modules,
        saved=saved,
        digest=check_theta(store, modules, saved),
        labels=labels_beside(source.path),
        repo_id=source.repo_id,
        revision=source.revision,
        base_fingerprint=read_base_record(source.folder),
        **facts,
    )
