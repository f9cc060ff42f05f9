"""From what a user names to planned merges: open the adapters and the base, and plan."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.adapters.adapter import Adapter, Weighted
from converters.adapters.embedded_base import SELF, open_embedded
from converters.adapters.opening import open_adapters, open_weighted
from converters.api.options import MergeOptions, Sources
from converters.errors import OptionError
from converters.files.sizes import parse_size
from converters.hub.names import SHORT_NAMES
from converters.models.checkpoint import Checkpoint, open_checkpoint
from converters.models.finding import find_base
from converters.plans.merge import Plan, plan_merge
from converters.plans.tokens import token_notes


def plan_merges(sources: Sources, options: MergeOptions, *, each: bool = False) -> list[Plan]:
    """Open base and adapters and plan one merge of all adapters; with `each`, one merge for each. Writes nothing."""
    limit = parse_size(options.max_shard_size)
    adapters = open_sources(sources)  # before the base: a wrong adapter should not cost a download
    base, notes = open_base(sources, adapters)
    groups: list[Sequence[Weighted]] = [[one] for one in adapters] if each else [adapters]
    plans = [
        plan_merge(
            base,
            group,
            dtype=options.dtype,
            max_shard_size=limit,
            labels=options.labels,
            force_base=options.force_base,
        )
        for group in groups
    ]
    plans = [replace(plan, notes=(*plan.notes, *token_notes(plan.tensors, plan.companions))) for plan in plans]
    return [replace(plans[0], notes=(*notes, *plans[0].notes)), *plans[1:]]


def open_sources(sources: Sources) -> tuple[Weighted, ...]:
    """Open the adapters. Raises what `open_adapters` raises."""
    given = sources.adapters
    several = [given] if isinstance(given, str | Path | Adapter | Weighted) else list(given)
    if sources.names_have_weights:
        return open_weighted(
            [str(name) for name in several],
            layout=sources.layout,
            scaling=sources.scaling,
            revision=sources.adapter_revision,
            token=sources.token,
        )
    return open_adapters(
        several,
        layout=sources.layout,
        scaling=sources.scaling,
        revision=sources.adapter_revision,
        token=sources.token,
    )


def open_base(sources: Sources, adapters: Sequence[Weighted]) -> tuple[Checkpoint, list[str]]:
    """Open the base; returns it with notes for the user.

    Args:
        sources: what names it.
        adapters: the opened adapters; the base may be saved in one of them, or its revision be named there.

    Raises:
        OptionError: no base was given, or an option does not apply to it.
        BaseModelError, HubError: it cannot be opened, or not be downloaded.
    """
    if sources.base is None:
        raise OptionError("base= is missing")
    base, revision = str(sources.base), sources.revision
    if base == SELF and not Path(SELF).is_dir():
        if sources.stream:
            raise OptionError("stream= is for a base on the Hub, not for base='self'")
        carriers = [weighted.adapter for weighted in adapters if weighted.adapter.embedded]
        return open_embedded(carriers[0] if carriers else adapters[0].adapter), []
    for weighted in adapters:
        if revision is None and _is_trained_on(weighted.adapter, base):
            revision = weighted.adapter.base_revision
    source = find_base(base, revision, sources.token, sources.stream)
    opened = open_checkpoint(source.folder, source.repo_id, source.revision, stream=source.stream)
    return opened, [source.note] if source.note else []


def _is_trained_on(adapter: Adapter, base: str) -> bool:
    """Whether `base` names, on the Hub, the model that the adapter's config says it was trained on."""
    return not Path(base).expanduser().is_dir() and adapter.base_name == SHORT_NAMES.get(base, base)
