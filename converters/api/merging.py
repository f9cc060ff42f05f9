"""Merging in one call: open, plan, carry out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.adapters.adapter import Adapter, Weighted
from converters.adapters.embedded_base import SELF, open_embedded
from converters.adapters.opening import AdapterSpec, open_adapters
from converters.errors import OptionError
from converters.files.sizes import parse_size
from converters.hub.names import SHORT_NAMES
from converters.models.checkpoint import Checkpoint, open_checkpoint
from converters.models.finding import find_base
from converters.outputs.checkpoint.write import MergeResult, run_merges
from converters.plans.merge import Plan, plan_merge
from converters.plans.several import name_outputs, share_tensors


def merge(
    base: str | Path,
    adapter: AdapterSpec | Sequence[AdapterSpec],
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    layout: str | None = None,
    scaling: float | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_shard_size: str = "5GB",
    labels: list[str] | None = None,
    overwrite: bool = False,
    force_base: bool = False,
    verify: bool = True,
    share: bool = False,
    resume: bool = False,
    stream: bool = False,
) -> MergeResult:
    """Merge trained adapters into a base checkpoint: every adapted weight becomes `W0 + Σ weight · f(W0; θ)`.

    Args:
        base: local folder, Hub id, or short name (`llama2-7b`, ...); `self` for the base weights inside the adapter.
        adapter: one adapter or several: paths or Hub ids, opened ones, or `Weighted` ones. Every delta is computed
            from the original W0.
        output: folder to write; `./<base>-<adapter>` by default.
        revision, token: for a base on the Hub; the revision is by default the one the adapter's config names.
        adapter_revision: for an adapter on the Hub.
        layout, scaling: for adapters that do not tell; see `open_adapters`.
        dtype: `auto` (each tensor's own), `bf16`, `fp16`, `fp32`.
        device: where f is evaluated: `auto` (every GPU, or the CPU), `cpu`, `cuda`, `cuda:N`.
        max_shard_size: like `5GB`; `base` keeps the base's sharding.
        labels: class labels for a classification head that comes with the adapter.
        overwrite: replace an output of an earlier merge, at the end and at once.
        force_base: merge although the adapter was trained on another base.
        verify: check the written files before they are published.
        share: link to files of the base that no adapter changes (reflinks, else hard links), instead of copying them.
        resume: go on with what a run of the same merge had written when it ended, and keep what this one has written
            if it fails.
        stream: leave a base on the Hub there, and fetch its shards one by one; at most two are on the disk at a time.

    Raises:
        PeanutError: see `converters.errors`; whichever it is, no output was written or changed.
    """
    plan = prepare_merge(
        base, adapter, revision=revision, adapter_revision=adapter_revision, token=token, layout=layout,
        scaling=scaling, dtype=dtype, max_shard_size=max_shard_size, labels=labels, force_base=force_base,
        stream=stream,
    )  # fmt: skip
    outputs = {plan.default_output if output is None else Path(output): plan}
    return run_merges(
        share_tensors(outputs) if share else outputs,
        device=device, overwrite=overwrite, verify=verify, share=share, resume=resume,
    )[0]  # fmt: skip


def merge_each(
    base: str | Path,
    adapters: Sequence[AdapterSpec],
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    layout: str | None = None,
    scaling: float | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    force_base: bool = False,
    verify: bool = True,
    share: bool = False,
    resume: bool = False,
    stream: bool = False,
) -> list[MergeResult]:
    """Merge every adapter on its own into the base, which is read once: one output for each.

    Args:
        base: as for `merge`.
        adapters: several, each as for `merge`.
        folder: the outputs are `folder/<adapter>`; by default `./<base>-<adapter>`.
        share: write what no adapter changes once, and link to it (reflinks, else hard links).

    The rest is as for `merge`. All outputs appear at the end, one after the other.

    Raises:
        PeanutError: see `converters.errors`; whichever it is, no output was written or changed.
    """
    plans = prepare_each(
        base, adapters, revision=revision, adapter_revision=adapter_revision, token=token, layout=layout,
        scaling=scaling, dtype=dtype, max_shard_size=max_shard_size, force_base=force_base, stream=stream,
    )  # fmt: skip
    outputs = name_outputs(plans, None if folder is None else Path(folder))
    return run_merges(
        share_tensors(outputs) if share else outputs,
        device=device, overwrite=overwrite, verify=verify, share=share, resume=resume,
    )  # fmt: skip


def prepare_merge(
    base: str | Path,
    adapter: AdapterSpec | Sequence[AdapterSpec],
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    layout: str | None = None,
    scaling: float | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    labels: list[str] | None = None,
    force_base: bool = False,
    stream: bool = False,
) -> Plan:
    """Open base and adapters and plan their merge; see `merge`. Writes nothing."""
    limit = parse_size(max_shard_size)
    # before the base: a wrong adapter should not cost a download
    adapters = open_adapters(adapter, layout=layout, scaling=scaling, revision=adapter_revision, token=token)
    opened_base, notes = open_base(base, adapters, revision=revision, token=token, stream=stream)
    plan = plan_merge(opened_base, adapters, dtype=dtype, max_shard_size=limit, labels=labels, force_base=force_base)
    return replace(plan, notes=(*notes, *plan.notes))


def prepare_each(
    base: str | Path,
    adapters: AdapterSpec | Sequence[AdapterSpec],
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | None = None,
    layout: str | None = None,
    scaling: float | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    labels: list[str] | None = None,
    force_base: bool = False,
    stream: bool = False,
) -> list[Plan]:
    """Open base and adapters and plan a merge for each adapter; see `merge_each`. Writes nothing."""
    limit = parse_size(max_shard_size)
    opened = open_adapters(adapters, layout=layout, scaling=scaling, revision=adapter_revision, token=token)
    opened_base, notes = open_base(base, opened, revision=revision, token=token, stream=stream)
    plans = [
        plan_merge(opened_base, [one], dtype=dtype, max_shard_size=limit, labels=labels, force_base=force_base)
        for one in opened
    ]
    return [replace(plans[0], notes=(*notes, *plans[0].notes)), *plans[1:]]


def open_base(
    base: str | Path,
    adapters: Sequence[Weighted],
    *,
    revision: str | None = None,
    token: str | None = None,
    stream: bool = False,
) -> tuple[Checkpoint, list[str]]:
    """Open what `--base` names, and what to tell the user of it; see `merge`."""
    if str(base) == SELF and not Path(SELF).is_dir():
        if stream:
            raise OptionError("--stream is for a base on the Hub, not for --base self")
        carriers = [weighted.adapter for weighted in adapters if weighted.adapter.embedded]
        return open_embedded(carriers[0] if carriers else adapters[0].adapter), []
    for weighted in adapters:
        if revision is None and _is_trained_on(weighted.adapter, str(base)):
            revision = weighted.adapter.base_revision
    source = find_base(str(base), revision, token, stream)
    opened = open_checkpoint(source.folder, source.repo_id, source.revision, stream=source.stream)
    return opened, [source.note] if source.note else []


def _is_trained_on(adapter: Adapter, base: str) -> bool:
    """Whether `base` names, on the Hub, what the adapter's config says it was trained on."""
    return not Path(base).expanduser().is_dir() and adapter.base_name == SHORT_NAMES.get(base, base)
