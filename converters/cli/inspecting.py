"""What `peanut-inspect` does with its options: describe an adapter, or verify an output."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from converters.adapters import facts as description
from converters.adapters.adapter import Adapter, Weighted
from converters.adapters.loading import load_adapter
from converters.api.options import Sources
from converters.api.planning import open_base, open_sources
from converters.cli import console, console_adapters
from converters.errors import MissingScalingError, OptionError
from converters.inspection.norms import DeltaNorm, delta_norms, record_base
from converters.inspection.plot import check_plot, plot_norms
from converters.models.checkpoint import Checkpoint
from converters.outputs.verifying import verify_output


def verify(folder: Path, full: Sources | None, as_json: bool) -> None:
    """Compare an output with its manifest; with `full`, recompute it from its base and adapters."""
    open_inputs = None if full is None else partial(_open_inputs, full)
    console.print_shown(verify_output(folder, open_inputs, console.TerminalProgress()), as_json)


def _open_inputs(sources: Sources) -> tuple[Checkpoint, Sequence[Weighted]]:
    adapters = open_sources(sources)
    return open_base(sources, adapters)[0], adapters


def describe(adapter: str, sources: Sources, *, plot: Path | None, record: bool, as_json: bool) -> None:
    """Show what an adapter is; with a base in `sources`, how strongly it acts where.

    Args:
        adapter: folder, weights or Hub id.
        sources: its base, and how to open both.
        plot: file to draw the norms into.
        record: write the base's fingerprint beside the adapter.
        as_json: print JSON.
    """
    for name, wanted in (("--record-base", record), ("--plot", plot is not None)):
        if wanted and sources.base is None:
            raise OptionError(f"{name} needs --base")
    if plot is not None:
        check_plot(plot)
    opened, unscaled = _open(adapter, sources)
    norms: list[DeltaNorm] = []
    if sources.base is not None:
        opened, norms = _measure(adapter, opened, sources, record)
    if plot is not None and not norms:
        raise OptionError(
            f"--plot: {opened.name} updates no weight, it only replaces tensors; there is nothing to plot"
        )
    if plot is not None:
        plot_norms(norms, f"where {opened.name} acts", plot)
    facts, shapes = description.describe(opened), description.module_shapes(opened)
    methods = description.module_methods(opened)
    if unscaled:
        facts |= {"scaling": "not stored: to merge it, give --scaling", "digest": None}
        for module in methods:  # what stands there was made up
            shapes[module]["scaling"] = methods[module]["settings"]["scaling"] = "not stored"
    if as_json:
        rows = [{"module": n.module, "shape": n.shape, "delta": n.delta, "weight": n.weight} for n in norms]
        per_module = {"shapes": shapes, "methods": methods, **({"norms": rows} if sources.base else {})}
        print(json.dumps({**facts, **per_module}, indent=2))
        return
    console_adapters.print_facts(facts)
    console_adapters.print_methods(methods)
    console_adapters.print_shapes(shapes)
    if norms:
        console_adapters.print_norms(norms)


def _open(adapter: str, sources: Sources) -> tuple[Adapter, bool]:
    """The adapter, and whether its scaling is unknown: without a base, the other facts are still of use."""
    try:
        return _load(adapter, sources), False
    except MissingScalingError:
        if sources.base is not None:
            raise
        return _load(adapter, replace(sources, scaling=1.0)), True


def _load(adapter: str, sources: Sources) -> Adapter:
    return load_adapter(
        adapter,
        layout=sources.layout,
        scaling=sources.scaling,
        revision=sources.adapter_revision,
        token=sources.token,
    )


def _measure(adapter: str, opened: Adapter, sources: Sources, record: bool) -> tuple[Adapter, list[DeltaNorm]]:
    """The adapter, opened again if its base was recorded, and its norms."""
    checkpoint, notes = open_base(sources, [Weighted(opened)])
    console.print_notes(notes)
    if record:
        console.err.print(f"recorded the base in {record_base(opened, checkpoint)}", markup=False)
        opened = _load(adapter, sources)
    with console.TerminalProgress().counter("evaluating f", len(opened.modules)) as advance:
        return opened, delta_norms(opened, checkpoint, advance)
