"""The format `lora`: one LoRA adapter, for vLLM and HF PEFT."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.evaluation.worker import find_devices
from converters.files.sizes import size_text
from converters.outputs.base import OpenInputs, OutputRequest, Progress, Shown, WriteOptions
from converters.outputs.checking import verify_adapter
from converters.outputs.lora.options import LoraOptions
from converters.outputs.lora.plan import LoraAdapterPlan, plan_lora_adapter
from converters.outputs.lora.write import LoraCheck, write_lora_adapter
from converters.plans.merge import Plan


class LoraFormat:
    """See `base.Format`."""

    name = "lora"

    def plan(self, plans: Sequence[Plan], request: OutputRequest) -> LoraAdapterPlan:
        """The sum of the adapters as one LoRA adapter, by default in `./<adapter>-lora`."""
        options = LoraOptions.of(request.own)
        find_devices(request.write.device)
        output = request.output or Path(f"{plans[0].name}-lora")
        remedy = "merge it, or approximate it with rank="
        return plan_lora_adapter(plans[0], output, request.write.overwrite, options, remedy=remedy)

    def folders(self, planned: LoraAdapterPlan) -> Sequence[Path]:
        """The only folder."""
        return [planned.output]

    def write(self, planned: LoraAdapterPlan, options: WriteOptions, progress: Progress) -> LoraCheck:
        """Write and check it."""
        with progress.bar("evaluating f", planned.source_bytes) as advance:
            return write_lora_adapter(planned, device=options.device, overwrite=options.overwrite, advance=advance)

    def show(self, planned: LoraAdapterPlan, result: LoraCheck | None) -> Shown:
        """Its ranks, how well it approximates and was checked, and how to serve it."""
        whole: list[str] = planned.config["modules_to_save"] or []
        notes = tuple(f"vLLM refuses it: {reason}" for reason in planned.vllm_refuses)
        facts = {
            "output": str(planned.output),
            "modules": len(planned.modules),
            "modules_to_save": whole,
            "r": planned.r,
            "dtype": planned.dtype,
            "max_lora_rank": planned.max_lora_rank,
            "vllm_refuses": planned.vllm_refuses,
            "notes": (*planned.plan.notes, *notes),
            **_verification(result),
        }
        ranks = ", ".join(map(str, sorted(set(planned.ranks.values()))))
        biases = f", biases of {len(planned.biases)} (lora_bias)" if planned.biases else ""
        lines = [
            f"{'wrote' if result else 'would write'} {planned.output}: a LoRA adapter, r = {ranks}, {planned.dtype}, "
            f"{size_text(planned.nbytes)}",
            f"  {len(planned.modules)} modules, whole: {', '.join(whole) or 'none'}{biases}",
        ]
        if result:
            lines += [*(result.approximation.lines() if result.approximation else ()), _checked(planned, result)]
        return Shown(facts, (*lines, *(f"  {line}" for line in notes or [_how_to_serve(planned)])))

    def verify(self, folder: Path, manifest: Mapping[str, Any], full: OpenInputs | None, progress: Progress) -> Shown:
        """Compare its weights with their hash."""
        return verify_adapter(folder, manifest, full)


def _verification(result: LoraCheck | None) -> dict[str, Any]:
    if result is None:
        return {"dry_run": True}
    facts = {"verification": {"recomputed": result.recomputed, "max_error": result.max_error}}
    if result.approximation is None:
        return facts
    return {**facts, "approximation": {**result.approximation.facts(), "found": result.approximation.found}}


def _checked(planned: LoraAdapterPlan, result: LoraCheck) -> str:
    checked = f"  verified: {result.recomputed} numbers of the deltas recomputed in float64"
    exact = result.approximation.exact if result.approximation else len(planned.modules)
    if not exact:
        return checked
    of = "" if exact == len(planned.modules) else " of exact factors"
    return f"{checked}, largest error{of} {result.max_error:.1e} of the largest delta"


def _how_to_serve(planned: LoraAdapterPlan) -> str:
    name = shlex.quote(f"{planned.output.name}={planned.output}")
    return (
        f"vllm serve {planned.plan.base.repo_id or planned.plan.base.folder} --enable-lora "
        f"--max-lora-rank {planned.max_lora_rank} --lora-modules {name}"
    )


FORMAT = LoraFormat()
