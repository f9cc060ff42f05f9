"""The format `merged`: a checkpoint that every runtime loads."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.evaluation.verify import Verification
from converters.files.sizes import size_text
from converters.outputs.base import OpenInputs, OutputRequest, Progress, Shown, WriteOptions
from converters.outputs.checkpoint.recheck import check_against, check_hashes, open_written, plan_again
from converters.outputs.checkpoint.write import CheckpointsPlan, MergeResult, plan_checkpoints, write_checkpoints
from converters.plans.merge import Plan
from converters.plans.several import name_outputs, share_tensors


@dataclass(frozen=True, eq=False)
class MergedPlan:
    """Checkpoints that can be written; `several` if they were asked for as a list, even of one."""

    checkpoints: CheckpointsPlan
    several: bool


def name_checkpoints(plans: Sequence[Plan], output: Path | None, each: bool, share: bool) -> dict[Path, Plan]:
    """Output folder -> plan, with what several outputs share in files of its own if `share` asks for it."""
    outputs = name_outputs(plans, output) if each else {output or plans[0].default_output: plans[0]}
    return share_tensors(outputs) if share else outputs


class MergedFormat:
    """See `base.Format`."""

    name = "merged"

    def plan(self, plans: Sequence[Plan], request: OutputRequest) -> MergedPlan:
        """A checkpoint of the only plan, or one for each."""
        outputs = name_checkpoints(plans, request.output, request.each, request.write.share)
        return MergedPlan(plan_checkpoints(outputs, request.write), request.each)

    def folders(self, planned: MergedPlan) -> Sequence[Path]:
        """All outputs, also those that are finished already."""
        return list(planned.checkpoints.outputs)

    def write(self, planned: MergedPlan, options: WriteOptions, progress: Progress) -> Sequence[MergeResult]:
        """Write and check them, in one pass over the base."""
        plans = planned.checkpoints.outputs.values()
        total = sum(plan.total_size for plan in plans) * (2 if options.verify else 1)
        with progress.bar("merging", total) as advance:
            return write_checkpoints(planned.checkpoints, options, advance)

    def show(self, planned: MergedPlan, result: Sequence[MergeResult] | None) -> Shown:
        """What each output consists of, and how well it was checked; as JSON a list if there are several."""
        if result is None:
            outputs = planned.checkpoints.outputs
            facts = [_plan_facts(plan, target) for target, plan in outputs.items()]
            lines = [line for target, plan in outputs.items() for line in _plan_lines(plan, target)]
        else:
            facts = [_result_facts(one) for one in result]
            lines = [line for one in result for line in _result_lines(one)]
        return Shown(facts if planned.several else facts[0], tuple(lines))

    def verify(self, folder: Path, manifest: Mapping[str, Any], full: OpenInputs | None, progress: Progress) -> Shown:
        """Compare every tensor with its hash; with `full`, recompute every number."""
        found, _ = open_written(folder)
        plan = plan_again(folder, *full()) if full is not None else None
        size = sum(info.nbytes for info in found.tensors.values())
        verification = None
        with progress.bar("checking", size * (1 if plan is None else 2)) as advance:
            check_hashes(folder, advance)
            if plan is not None:
                verification = check_against(folder, plan, advance)
        return _check_shown(folder, len(found.tensors), verification)


FORMAT = MergedFormat()


def _plan_facts(plan: Plan, target: Path) -> dict[str, Any]:
    return {
        "output": str(target),
        "total_size": plan.total_size,
        "shards": _shard_sizes(plan),
        "counts": _counts(plan),
        "tensors": {tensor.name: tensor.action.value for tensor in plan.tensors},
        "dropped": dict(plan.dropped),
        "notes": plan.notes,
        "dry_run": True,
    }


def _plan_lines(plan: Plan, target: Path) -> list[str]:
    return [
        f"would write {target}: {size_text(plan.total_size)}",
        *(f"  {shard}  {size_text(size)}" for shard, size in _shard_sizes(plan).items()),
        f"  {_counts_text(plan)}",
        *(f"  left out: {name} ({reason})" for name, reason in plan.dropped.items()),
    ]


def _result_facts(result: MergeResult) -> dict[str, Any]:
    plan = result.plan
    return {
        "output": str(result.output),
        "total_size": plan.total_size,
        "counts": _counts(plan),
        "taken_over": result.taken_over,
        "dropped": dict(plan.dropped),
        "notes": plan.notes,
        "seconds": round(result.seconds, 3),
        "adapter_digests": [weighted.adapter.digest for weighted in plan.adapters],
        "base_fingerprint": plan.base.fingerprint if plan.base.knows_fingerprint else None,
        "verification": result.verification.summary() if result.verification else None,
    }


def _result_lines(result: MergeResult) -> list[str]:
    plan, checked = result.plan, result.verification
    lines = [f"wrote {result.output}: {size_text(plan.total_size)} in {result.seconds:.1f} s"]
    if result.taken_over:
        lines.append(f"  {result.taken_over} of {len(plan.tensors)} tensors were written by an earlier run")
    lines.append(f"  {_counts_text(plan)}")
    if checked:
        lines.append(
            f"  verified: {checked.tensors} tensors, {checked.recomputed} numbers recomputed in float64, "
            f"largest error {checked.max_ulp:.3f} ulp"
        )
    return lines


def _check_shown(folder: Path, tensors: int, verification: Verification | None) -> Shown:
    recomputed = verification.summary() if verification else None
    lines = [f"{folder}: all {tensors} tensors are as they were written"]
    if verification:
        lines.append(
            f"  all {verification.recomputed} numbers of updated weights recomputed in float64, largest error "
            f"{verification.max_ulp:.3f} ulp; the others equal the base's or the adapter's"
        )
    return Shown({"output": str(folder), "tensors": tensors, "recomputed": recomputed}, tuple(lines))


def _shard_sizes(plan: Plan) -> dict[str, int]:
    return {shard: sum(tensor.nbytes for tensor in tensors) for shard, tensors in plan.shards.items()}


def _counts(plan: Plan) -> Counter[str]:
    return Counter(tensor.action.value for tensor in plan.tensors)


def _counts_text(plan: Plan) -> str:
    return ", ".join(f"{n} {action}" for action, n in sorted(_counts(plan).items()))
