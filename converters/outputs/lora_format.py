"""The format `lora`: one LoRA adapter, for vLLM and HF PEFT."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converters.evaluation.verify import FactorCheck
from converters.evaluation.worker import find_devices
from converters.files.sizes import size_text
from converters.outputs.base import OpenInputs, OutputRequest, Progress, Shown, WriteOptions
from converters.outputs.checking import verify_adapter
from converters.outputs.lora import VLLM_RANKS, LoraAdapterPlan, plan_lora_adapter, write_lora_adapter
from converters.plans.merge import Plan


class LoraFormat:
    """See `base.Format`."""

    name = "lora"

    def plan(self, plans: Sequence[Plan], request: OutputRequest) -> LoraAdapterPlan:
        """The sum of the adapters as one LoRA adapter, by default in `./<adapter>-lora`."""
        find_devices(request.write.device)
        output = request.output or Path(f"{plans[0].name}-lora")
        return plan_lora_adapter(plans[0], output, request.write.overwrite)

    def folders(self, planned: LoraAdapterPlan) -> Sequence[Path]:
        """The only folder."""
        return [planned.output]

    def write(self, planned: LoraAdapterPlan, options: WriteOptions, progress: Progress) -> FactorCheck:
        """Write and check it."""
        with progress.bar("evaluating f", planned.source_bytes) as advance:
            return write_lora_adapter(planned, device=options.device, overwrite=options.overwrite, advance=advance)

    def show(self, planned: LoraAdapterPlan, result: FactorCheck | None) -> Shown:
        """Its ranks, how well it was checked, and how to serve it."""
        whole: list[str] = planned.config["modules_to_save"] or []
        facts = {
            "output": str(planned.output),
            "modules": len(planned.modules),
            "modules_to_save": whole,
            "r": planned.r,
            "dtype": planned.dtype,
            "max_lora_rank": planned.max_lora_rank,
            "notes": planned.plan.notes,
            **({"verification": asdict(result)} if result else {"dry_run": True}),
        }
        ranks = sorted({planned.config["r"], *planned.config["rank_pattern"].values()})
        lines = [
            f"{'wrote' if result else 'would write'} {planned.output}: a LoRA adapter, "
            f"r = {', '.join(map(str, ranks))}, {planned.dtype}, {size_text(planned.nbytes)}",
            f"  {len(planned.modules)} modules, whole: {', '.join(whole) or 'none'}",
        ]
        if result:
            lines.append(
                f"  verified: {result.recomputed} numbers of the deltas recomputed in float64, largest error "
                f"{result.max_error:.1e} of the largest delta"
            )
        return Shown(facts, (*lines, f"  {_how_to_serve(planned)}"))

    def verify(self, folder: Path, manifest: Mapping[str, Any], full: OpenInputs | None, progress: Progress) -> Shown:
        """Compare its weights with their hash."""
        return verify_adapter(folder, manifest, full)


def _how_to_serve(planned: LoraAdapterPlan) -> str:
    if planned.max_lora_rank is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}, not {planned.r}: merge it for vLLM"
    name = shlex.quote(f"{planned.output.name}={planned.output}")
    return (
        f"vllm serve {planned.plan.base.repo_id or planned.plan.base.folder} --enable-lora "
        f"--max-lora-rank {planned.max_lora_rank} --lora-modules {name}"
    )


FORMAT = LoraFormat()
