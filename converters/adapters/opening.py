"""Opening the adapters that a user names, each with its weight in a sum."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.adapters.adapter import Adapter, Weighted
from converters.adapters.finding import find_adapter
from converters.adapters.loading import is_claimed, read_adapter
from converters.errors import OptionError

# a path or Hub id, an opened adapter, or one with a weight
AdapterSpec = str | Path | Adapter | Weighted

_WEIGHT = re.compile(r"(?P<name>.+)=(?P<weight>[^=/]+)")


def parse_weight(text: str) -> tuple[str, float]:
    """`style=0.5` -> (`style`, 0.5); 1 if no weight is given, or if a path of that whole name exists.

    Raises `OptionError` when the weight is not a finite number.
    """
    found = _WEIGHT.fullmatch(text)
    if found is None or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(found["weight"])
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise OptionError(
            f"adapter={text!r}: '{found['weight']}' is not a valid weight; expected a finite number, as in style=0.5"
        )
    return found["name"], weight


def open_weighted(
    texts: Sequence[str],
    *,
    layout: str | None = None,
    scaling: float | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Weighted, ...]:
    """`open_adapters` for command-line values: paths or Hub ids, each with an optional weight (`style=0.5`)."""
    parsed = [parse_weight(text) for text in texts]
    opened = open_adapters(
        [name for name, _ in parsed], layout=layout, scaling=scaling, revision=revision, token=token
    )
    return tuple(replace(one, weight=weight) for one, (_, weight) in zip(opened, parsed, strict=True))


def open_adapters(
    specs: AdapterSpec | Sequence[AdapterSpec],
    *,
    layout: str | None = None,
    scaling: float | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Weighted, ...]:
    """Open one or several adapters.

    Args:
        specs: one adapter or several, each a path or Hub id, an opened `Adapter`, or one with a weight (`Weighted`).
        layout, scaling: see `load_adapter`. Of several adapters, `layout` applies to those it fits and `scaling` to
            those that store none; each must apply to one at least.
        revision, token: for an adapter on the Hub.

    Raises what `load_adapter` raises, and `OptionError` for an option that applies to none.
    """
    several = [specs] if isinstance(specs, str | Path | Adapter | Weighted) else list(specs)
    if not several:
        raise OptionError("no adapter was given")
    opened, unused = [], {"layout": layout, "scaling": scaling}
    for spec in several:
        if isinstance(spec, Adapter | Weighted):
            opened.append(spec if isinstance(spec, Weighted) else Weighted(spec))
            continue
        source = find_adapter(str(spec), revision, token)
        alone = len(several) == 1
        own_layout = layout if alone or (layout is not None and is_claimed(source, layout)) else None
        own_scaling = scaling if alone or not source.has_config else None
        for name, value in (("layout", own_layout), ("scaling", own_scaling)):
            if value is not None:
                unused[name] = None
        opened.append(Weighted(read_adapter(source, own_layout, own_scaling)))
    for name, value in unused.items():
        if value is not None:
            raise OptionError(f"{name}={value!r} applies to none of the adapters")
    return tuple(opened)
