"""Opening one adapter: find its layout, and read it."""

import math
from dataclasses import replace
from pathlib import Path

from converters.adapters.adapter import Adapter
from converters.adapters.finding import find_adapter
from converters.adapters.layouts import native
from converters.adapters.layouts.layout import Layout
from converters.adapters.layouts.lora import LORA
from converters.adapters.layouts.names import LAYOUT_SUMMARIES
from converters.adapters.layouts.peft_parts.lora_fields import proves_peft
from converters.adapters.layouts.table import LAYOUTS
from converters.adapters.refusals import refuse_foreign_keys, refuse_others
from converters.adapters.source import AdapterSource
from converters.errors import LayoutError, OptionError


def load_adapter(
    adapter: str | Path,
    *,
    layout: str | None = None,
    scaling: float | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Adapter:
    """Open a trained adapter. Weights are read when they are asked for.

    Args:
        adapter: a folder, a file of weights, or a Hub id (`user/name`).
        layout: a name of `LAYOUT_SUMMARIES`, where the layout cannot be detected.
        scaling: s, for layouts that do not store it.
        revision, token: for an adapter on the Hub.

    Raises:
        LayoutError: nothing there, or not in a layout that this version reads; the message says what was found.
        AdapterConfigError: the config is invalid, unknown, or disagrees with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
        OptionError: `scaling` is missing or superfluous, `layout` unknown.
        HubError: the download failed.
    """
    return read_adapter(find_adapter(str(adapter), revision, token), layout, scaling)


def read_adapter(source: AdapterSource, layout: str | None = None, scaling: float | None = None) -> Adapter:
    """The adapter in a source; see `load_adapter`."""
    if layout is not None and layout not in LAYOUT_SUMMARIES:
        raise OptionError(f"layout '{layout}' is unknown; known are {', '.join(LAYOUT_SUMMARIES)}")
    if scaling is not None and not math.isfinite(scaling):
        raise OptionError(f"scaling='{scaling}': expected a finite number")
    refuse_others(source)
    claims = _claims(source, layout)
    if not claims:
        raise _unclaimed(source, layout)
    first, evidence = claims[0]
    opened = first.read(source, evidence, scaling)
    return opened if len(claims) == 1 else replace(opened, rival=claims[1][0].name)


def is_claimed(source: AdapterSource, layout: str) -> bool:
    """Whether a source can be read as `layout`."""
    return bool(_claims(source, layout))


def _claims(source: AdapterSource, layout: str | None) -> list[tuple[Layout, str]]:
    """The layouts that claim the source, with their evidence."""
    if layout is None and (evidence := native.claims(source)) is not None:
        return [(native.LAYOUT, evidence)]  # its own config says so: the weights need not be looked at
    refuse_foreign_keys(source)
    asked = [one for one in LAYOUTS if (one.name == layout if layout else not one.asked_only)]
    found = [(one, evidence) for one in asked if (evidence := one.claims(source)) is not None]
    proof = proves_peft(source.config) if len(found) > 1 else None
    if proof is None or LORA not in [one for one, _ in found]:
        return found
    return [(one, f"{evidence}; {proof}") for one, evidence in found if one is LORA]


def _unclaimed(source: AdapterSource, layout: str | None) -> LayoutError:
    """The error for a source that no layout claims."""
    shown = ", ".join(sorted(source.keys)[:3]) or "none"
    if layout is not None:
        claims = _claims(source, None)
        found = f"it is {claims[0][0].name}, because {claims[0][1]}" if claims else f"it has keys like {shown}"
        return LayoutError(f"{source.path} is not in the layout {layout} ({LAYOUT_SUMMARIES[layout]}): {found}")
    refuse_foreign_keys(source, unclaimed=True)
    if (source.path / "config.json").is_file():
        return LayoutError(f"{source.path} is a model without θ; expected an adapter (its keys: {shown}, ...)")
    return LayoutError(
        f"{source.weights}: no θ in a known layout (its keys: {shown}, ...); known layouts are "
        f"{', '.join(LAYOUT_SUMMARIES)}"
    )
