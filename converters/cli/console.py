"""What the commands show of merges: results on stdout, progress and the rest on stderr."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console

from converters.evaluation.verify import Verification
from converters.outputs.checkpoint.write import MergeResult
from converters.plans.merge import Plan

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


class Progress:
    """A progress bar on stderr, nothing where stderr is no terminal."""

    def __init__(self, total: int, what: str, as_bytes: bool) -> None:
        middle = [progress.DownloadColumn()] if as_bytes else [progress.MofNCompleteColumn()]
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            *middle,
            progress.TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return lambda amount: self._bar.advance(self._task, amount)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_plans(outputs: Mapping[Path, Plan], as_json: bool, several: bool) -> None:
    """What a run would write; as JSON a list if `several`."""
    if as_json:
        _print_json([_plan_facts(plan, target) for target, plan in outputs.items()], several)
        return
    for target, plan in outputs.items():
        _print_plan(plan, target)


def print_results(results: Sequence[MergeResult], as_json: bool, several: bool, pushed_to: str | None = None) -> None:
    """What a run wrote, how well it was checked, and where on the Hub it is; as JSON a list if `several`."""
    if as_json:
        _print_json([{**_result_facts(result), **pushed_facts(pushed_to)} for result in results], several)
        return
    for result in results:
        _print_result(result)
    print_pushed(pushed_to)


def pushed_facts(pushed_to: str | None) -> dict[str, str]:
    """For JSON: where on the Hub it is."""
    return {"pushed_to": pushed_to} if pushed_to else {}


def print_pushed(pushed_to: str | None) -> None:
    """Where on the Hub it is."""
    if pushed_to:
        out.print(f"pushed to {pushed_to}", markup=False)


def _print_json(facts: list[dict[str, Any]], several: bool) -> None:
    print(json.dumps(facts if several else facts[0], indent=2))


def _shard_sizes(plan: Plan) -> dict[str, int]:
    return {shard: sum(tensor.nbytes for tensor in tensors) for shard, tensors in plan.shards.items()}


def _plan_facts(plan: Plan, target: Path) -> dict[str, Any]:
    return {
        "output": str(target),
        "total_size": plan.total_size,
        "shards": _shard_sizes(plan),
        "counts": Counter(tensor.action.value for tensor in plan.tensors),
        "tensors": {tensor.name: tensor.action.value for tensor in plan.tensors},
        "dropped": dict(plan.dropped),
        "notes": plan.notes,
        "dry_run": True,
    }


def _print_plan(plan: Plan, target: Path) -> None:
    counts = Counter(tensor.action.value for tensor in plan.tensors)
    out.print(f"would write {target}: {size_text(plan.total_size)}", markup=False)
    for shard, size in _shard_sizes(plan).items():
        out.print(f"  {shard}  {size_text(size)}", markup=False)
    out.print("  " + ", ".join(f"{n} {action}" for action, n in sorted(counts.items())))
    for name, reason in plan.dropped.items():
        out.print(f"  left out: {name} ({reason})", markup=False)


def _result_facts(result: MergeResult) -> dict[str, Any]:
    plan = result.plan
    return {
        "output": str(result.output),
        "total_size": plan.total_size,
        "counts": Counter(tensor.action.value for tensor in plan.tensors),
        "taken_over": result.taken_over,
        "dropped": dict(plan.dropped),
        "notes": plan.notes,
        "seconds": round(result.seconds, 3),
        "adapter_digests": [weighted.adapter.digest for weighted in plan.adapters],
        "base_fingerprint": plan.base.fingerprint if plan.base.knows_fingerprint else None,
        "verification": result.verification.summary() if result.verification else None,
    }


def _print_result(result: MergeResult) -> None:
    counts = Counter(tensor.action.value for tensor in result.plan.tensors)
    checked = result.verification
    out.print(f"wrote {result.output}: {size_text(result.plan.total_size)} in {result.seconds:.1f} s", markup=False)
    if result.taken_over:
        out.print(f"  {result.taken_over} of {len(result.plan.tensors)} tensors were there from an earlier run")
    out.print("  " + ", ".join(f"{n} {action}" for action, n in sorted(counts.items())))
    if checked:
        out.print(
            f"  verified: {checked.tensors} tensors, {checked.recomputed} numbers recomputed in float64, "
            f"largest error {checked.max_ulp:.3f} ulp"
        )


def print_check(output: Path, tensors: int, verification: Verification | None, as_json: bool) -> None:
    """That a merged folder is as it should be."""
    if as_json:
        recomputed = verification.summary() if verification else None
        print(json.dumps({"output": str(output), "tensors": tensors, "recomputed": recomputed}, indent=2))
        return
    out.print(f"{output}: all {tensors} tensors are as they were written", markup=False)
    if verification:
        out.print(
            f"  all {verification.recomputed} numbers of updated weights recomputed in float64, largest error "
            f"{verification.max_ulp:.3f} ulp; the rest equals the base's, or the adapter's"
        )


def print_files(output: Path, files: Mapping[str, str], as_json: bool) -> None:
    """That the files of an export are as they should be."""
    if as_json:
        print(json.dumps({"output": str(output), "files": dict(files)}, indent=2))
        return
    out.print(f"{output}: all {len(files)} files are as they were written", markup=False)


def size_text(size: int) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
