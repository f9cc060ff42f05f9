"""The format `peft`: a PEANuT adapter as HF PEFT has them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.evaluation.worker import find_devices
from converters.outputs.base import OpenInputs, OutputRequest, Progress, Shown, WriteOptions
from converters.outputs.checking import verify_adapter
from converters.outputs.peft import PeftAdapterPlan, plan_peft_adapter, write_peft_adapter
from converters.plans.merge import Plan


class PeftFormat:
    """See `base.Format`."""

    name = "peft"

    def plan(self, plans: Sequence[Plan], request: OutputRequest) -> PeftAdapterPlan:
        """The only adapter, by default in `./<adapter>-peft`."""
        find_devices(request.write.device)  # nothing is evaluated, but a device that is not there is still an error
        output = request.output or Path(f"{plans[0].name}-peft")
        return plan_peft_adapter(plans[0], output, request.write.overwrite)

    def folders(self, planned: PeftAdapterPlan) -> Sequence[Path]:
        """The only folder."""
        return [planned.output]

    def write(self, planned: PeftAdapterPlan, options: WriteOptions, progress: Progress) -> Path:
        """Write it and read it back."""
        return write_peft_adapter(planned, overwrite=options.overwrite)

    def show(self, planned: PeftAdapterPlan, result: Path | None) -> Shown:
        """Its settings, and what it changes."""
        whole: list[str] = planned.config["modules_to_save"] or []
        settings = {key: planned.config[key] for key in ("r", "depth", "act_fn", "scaling")}
        facts = {
            "output": str(planned.output),
            "modules": len(planned.modules),
            "modules_to_save": whole,
            **settings,
            "notes": planned.plan.notes,
            **({} if result else {"dry_run": True}),
        }
        shown = ", ".join(f"{key} = {value}" for key, value in settings.items())
        lines = (
            f"{'wrote' if result else 'would write'} {planned.output}: an HF PEFT adapter, {shown}",
            f"  {len(planned.modules)} modules, whole: {', '.join(whole) or 'none'}",
        )
        return Shown(facts, lines)

    def verify(self, folder: Path, manifest: Mapping[str, Any], full: OpenInputs | None, progress: Progress) -> Shown:
        """Compare its weights with their hash."""
        return verify_adapter(folder, manifest, full)


FORMAT = PeftFormat()
