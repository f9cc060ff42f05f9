"""Write an adapter as HF PEFT's own PEANuT folder, where a PeanutConfig can express exactly what it does.

`PeftModel.from_pretrained(model, folder)` loads it (PEFT ≥ 0.19). Module names are those of the installed
transformers, which is what PEFT looks for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from converters.adapters.base_record import write_base_record
from converters.adapters.loading import load_adapter
from converters.errors import ConversionError, VerificationError
from converters.evaluation.factors import refuse_parts
from converters.files.json_files import write_json
from converters.files.names import ADAPTER_CONFIG, MANIFEST_NAME, PEFT_WEIGHTS
from converters.files.staging import check_output
from converters.methods.peanut.tweaker import Tweaker
from converters.models import config as model_config
from converters.models.architecture import Architecture
from converters.models.stored_names import architecture_of
from converters.outputs.base import WriteOptions
from converters.outputs.manifest import provenance, weights_entry
from converters.outputs.peft_names import PREFIX, base_facts, module_name, saved_modules, saved_tensors
from converters.outputs.publishing import publishing
from converters.plans.merge import Plan


@dataclass(frozen=True, eq=False)
class PeftAdapterPlan:
    """A PEFT adapter that can be written.

    Attributes:
        plan: the planned merge it was made from.
        output: folder to write.
        config: the adapter_config.json.
        modules: module name -> its tweaker.
        saved: tensor of modules_to_save -> the tensor.
    """

    plan: Plan
    output: Path
    config: dict[str, Any]
    modules: dict[str, Tweaker]
    saved: dict[str, Tensor]


def plan_peft_adapter(plan: Plan, output: str | Path, overwrite: bool = False) -> PeftAdapterPlan:
    """Plan to write the adapter of `plan` as a PEFT PEANuT adapter; its weight goes into the scaling.

    Args:
        plan: a planned merge, whose adapter was checked against its base and whose names are settled.
        output: folder to write.
        overwrite: replace an earlier output of this toolkit.

    Raises:
        ConversionError: a PeanutConfig cannot express what this adapter does; the message says why.
        OutputExistsError: the folder exists, or contains an input.
    """
    tweakers = _tweakers(plan)
    settings = _common_settings(tweakers)
    added = {tensor.name: tensor.shape for tensor in plan.tensors if tensor.source is None}
    arch = architecture_of(plan.base, plan.config, added)
    modules = {module_name(arch, name): tweaker for name, tweaker in tweakers.items()}
    saved = saved_tensors(plan, arch)
    config = _config(plan, arch, settings, sorted(modules), saved_modules(arch, saved))
    check_output(Path(output), overwrite, (plan.base.folder, plan.head.path))
    return PeftAdapterPlan(plan, Path(output), config, modules, saved)


def write_peft_adapter(converted: PeftAdapterPlan, *, overwrite: bool = False) -> Path:
    """Write a planned PEFT adapter and read it back; returns the folder.

    Raises:
        VerificationError: what was read back is not what was written.
        OutputError: a file could not be written. Whichever error it is, no existing output was changed.
    """
    output, plan = converted.output, converted.plan
    with publishing({output: [plan]}, WriteOptions(overwrite=overwrite)) as folders:
        staging = folders[output]
        write_json(staging / ADAPTER_CONFIG, converted.config)
        tensors = _state_dict(converted.modules, converted.saved)
        save_file(tensors, staging / PEFT_WEIGHTS[0], metadata={"format": "pt"})
        labels = model_config.labels_of(plan.config) if converted.saved else None
        if labels is not None:
            write_json(staging / "labels.json", labels)
        write_base_record(staging, plan.base)
        weights = weights_entry(staging / PEFT_WEIGHTS[0])
        facts = {**provenance(plan, plan.base.fingerprint), "format": "peft", "weights": weights}
        write_json(staging / MANIFEST_NAME, facts)
        _check_written(staging, converted.modules)
    return output


def _tweakers(plan: Plan) -> dict[str, Tweaker]:
    """Name of an updated tensor -> its tweaker. Raises `ConversionError` for what PEFT's PEANuT does not adapt."""
    if len(plan.adapters) > 1:
        raise ConversionError("a PEFT adapter cannot hold the sum of several; convert each, or merge them")
    refuse_parts(plan, "a PEANuT adapter")
    tweakers = {}
    for tensor in plan.tensors:
        for term in tensor.terms:
            if term.transposed:
                raise ConversionError(f"{tensor.name} is a Conv1D, which PEFT's PEANuT does not adapt")
            delta = plan.delta_of(term)
            if not isinstance(delta, Tweaker):
                name = plan.adapters[term.adapter].adapter.describe(term.module).name
                raise ConversionError(f"this is a {name} adapter; the peft format writes PEANuT adapters")
            tweakers[tensor.name] = delta
    if not tweakers:
        raise ConversionError("the adapter only replaces tensors; the peft format writes PEANuT adapters; merge it")
    return tweakers


def _common_settings(tweakers: dict[str, Tweaker]) -> dict[str, Any]:
    """r, depth, act_fn and scaling of all modules. Raises `ConversionError` where no PeanutConfig can state them."""
    configs = []
    for name, tweaker in tweakers.items():
        try:
            configs.append(tweaker.peanut_config())
        except ConversionError as error:
            raise ConversionError(
                f"a PeanutConfig cannot express what this adapter does to {name}: {error}; merge it"
            ) from None
    settings = {}
    for key in configs[0]:
        found = sorted({config[key] for config in configs})
        if len(found) > 1:
            raise ConversionError(
                f"a PeanutConfig has one {key} for all modules, this adapter has {', '.join(map(str, found))}; "
                "merge it"
            )
        settings[key] = found[0]
    return settings


def _config(
    plan: Plan, arch: Architecture, settings: dict[str, Any], targets: list[str], saved: list[str]
) -> dict[str, Any]:
    """The adapter_config.json (`peft/tuners/peanut/config.py`, `PeanutConfig`)."""
    return {
        **base_facts(plan, arch),
        "peft_type": "PEANUT",
        **settings,
        "target_modules": targets,
        "exclude_modules": None,
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_weights": True,
    }


def _state_dict(modules: dict[str, Tweaker], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
    for module, tweaker in modules.items():
        tensors |= {f"{PREFIX}{module}.peanut_{part}.weight": tensor for part, tensor in tweaker.parts.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _check_written(folder: Path, modules: dict[str, Tweaker]) -> None:
    """Read it back: the same θ under the same names."""
    adapter = load_adapter(folder)
    for module, wanted in modules.items():
        found = adapter.tweaker(module) if module in adapter.modules else None
        if found is None or (found.act_fn, found.scaling) != (wanted.act_fn, wanted.scaling):
            raise VerificationError(f"{folder}: {module} was not written as it should be")
        same = found.parts.keys() == wanted.parts.keys() and all(
            torch.equal(found.parts[part], tensor) for part, tensor in wanted.parts.items()
        )
        if not same:
            raise VerificationError(f"{folder}: θ of {module} was not written as it should be")
