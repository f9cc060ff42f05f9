"""Merging in one call: open, plan, write."""

from collections.abc import Sequence
from pathlib import Path

from converters.adapters.opening import AdapterSpec
from converters.api.options import MergeOptions, Sources
from converters.api.planning import plan_merges
from converters.outputs.base import WriteOptions
from converters.outputs.checkpoint.format import name_checkpoints
from converters.outputs.checkpoint.write import MergeResult, plan_checkpoints, write_checkpoints
from converters.plans.merge import Plan


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
        adapter: one adapter or several: paths or Hub ids, opened adapters, or `Weighted` ones. Every delta is
            computed from the original W0.
        output: folder to write; `./<base>-<adapter>` by default.
        revision: branch, tag or commit of a base on the Hub; by default the one that the adapter's config names.
        adapter_revision: branch, tag or commit of an adapter on the Hub.
        token: Hub token; by default the one huggingface-hub finds.
        layout, scaling: for adapters that do not state them; see `open_adapters`.
        dtype: `auto` (each tensor's own), `bf16`, `fp16`, `fp32`.
        device: where f is evaluated: `auto` (every GPU, or the CPU), `cpu`, `cuda`, `cuda:N`.
        max_shard_size: like `5GB`; `base` keeps the base's sharding.
        labels: class labels for a classification head that comes with the adapter.
        overwrite: replace an earlier output, in one step at the end.
        force_base: merge even if the adapter was trained on another base.
        verify: check the written files before they are published.
        share: link to files of the base that no adapter changes (reflinks, else hard links), instead of copying them.
        resume: continue an interrupted run of the same merge, and keep what this run has written if it fails.
        stream: fetch the shards of a base on the Hub one by one; at most two are on the disk at a time.

    Raises:
        PeanutError: see `converters.errors`; whichever it is, no output was written or changed.
    """
    sources = Sources(base, adapter, revision, adapter_revision, token, layout, scaling, stream)
    plans = plan_merges(sources, MergeOptions(dtype, max_shard_size, labels, force_base))
    write = WriteOptions(device, overwrite, verify, share, resume)
    outputs = name_checkpoints(plans, None if output is None else Path(output), each=False, share=share)
    return write_checkpoints(plan_checkpoints(outputs, write), write)[0]


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
    """Merge every adapter on its own into the base, which is read only once: one output for each adapter.

    Args:
        base: as for `merge`.
        adapters: several, each as for `merge`.
        folder: the outputs are `folder/<adapter>`; by default `./<base>-<adapter>`.
        share: write tensors that no adapter changes once, and link to them (reflinks, else hard links).

    The other arguments are those of `merge`. All outputs appear at the end, one after the other.

    Raises:
        PeanutError: see `converters.errors`; whichever it is, no output was written or changed.
    """
    sources = Sources(base, adapters, revision, adapter_revision, token, layout, scaling, stream)
    options = MergeOptions(dtype, max_shard_size, force_base=force_base)
    plans = plan_merges(sources, options, each=True)
    write = WriteOptions(device, overwrite, verify, share, resume)
    outputs = name_checkpoints(plans, None if folder is None else Path(folder), each=True, share=share)
    return write_checkpoints(plan_checkpoints(outputs, write), write)


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
    """Open base and adapters and plan their merge; the arguments are those of `merge`. Writes nothing.

    Raises `PeanutError`: see `converters.errors`.
    """
    sources = Sources(base, adapter, revision, adapter_revision, token, layout, scaling, stream)
    return plan_merges(sources, MergeOptions(dtype, max_shard_size, labels, force_base))[0]
