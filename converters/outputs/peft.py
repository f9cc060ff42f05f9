"""Write an adapter as HF PEFT's own PEANuT folder, where a PeanutConfig can express exactly what it does.

`PeftModel.from_pretrained(model, folder)` loads it (PEFT ≥ 0.19). Module names are those of the installed
transformers, which is what PEFT looks for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from converters.adapters.base_record import write_base_record
from converters.adapters.loading import load_adapter
from converters.adapters.targeting import PREFIX
from converters.errors import ConversionError, VerificationError
from converters.evaluation.accounting import changed_tensors, check_accounts, check_file
from converters.evaluation.factors import refuse_parts
from converters.files.json_files import write_json
from converters.files.names import ADAPTER_CONFIG, MANIFEST_NAME, PEFT_WEIGHTS
from converters.files.staging import check_output
from converters.files.writer import save_tensors
from converters.methods.peanut.tweaker import Tweaker
from converters.models import config as model_config
from converters.models.architecture import Architecture
from converters.outputs.base import WriteOptions
from converters.outputs.manifest import provenance, weights_entry
from converters.outputs.peft_names import (
    base_facts,
    by_module,
    by_saved,
    merged_architecture,
    refuse_changed_base,
    saved_modules,
    saved_tensors,
)
from converters.outputs.publishing import publishing
from converters.plans.beside_weights.companions import own_companions
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
        names: module, or tensor of modules_to_save -> tensor of the plan.
    """

    plan: Plan
    output: Path
    config: dict[str, Any]
    modules: dict[str, Tweaker]
    saved: dict[str, Tensor]
    names: dict[str, str]


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
    refuse_changed_base(plan)
    tweakers = _tweakers(plan)
    settings = _common_settings(tweakers)
    arch = merged_architecture(plan)
    modules = by_module(arch, tweakers.items())
    saved = saved_tensors(plan, arch)
    config = _config(plan, arch, settings, sorted(modules), saved_modules(arch, saved))
    check_output(Path(output), overwrite, (plan.base.folder, plan.head.path))
    names = by_module(arch, ((name, name) for name in tweakers))
    names |= {name: planned.name for name, planned in by_saved(plan, arch).items()}
    return PeftAdapterPlan(plan, Path(output), config, modules, saved, names)


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
        save_tensors(tensors, staging / PEFT_WEIGHTS[0], {"format": "pt"})
        labels = model_config.labels_of(plan.config) if converted.saved else None
        if labels is not None:
            write_json(staging / "labels.json", labels)
        write_base_record(staging, plan.base)
        weights = weights_entry(staging / PEFT_WEIGHTS[0])
        beside = own_companions(plan.head)
        beside.write(staging)
        facts = {
            **provenance(plan, plan.base.fingerprint),
            "format": "peft",
            "weights": weights,
            "companions": beside.facts(),
        }
        write_json(staging / MANIFEST_NAME, facts)
        _check_written(staging, converted)
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
        **base_facts(plan, arch, saved),
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


def _check_written(folder: Path, converted: PeftAdapterPlan) -> None:
    """Read it back: θ of every tensor that the plan changes, under the name it was planned to have."""
    plan = converted.plan
    own = [converted.names[name] for name in (*converted.modules, *converted.saved)]
    check_accounts(plan, changed_tensors(plan), own, "the PEFT adapter")
    adapter, planned = load_adapter(folder), _tweakers(plan)
    shapes = {name: tuple(tensor.shape) for name, tensor in _state_dict(converted.modules, converted.saved).items()}
    check_file(folder / PEFT_WEIGHTS[0], shapes)
    for module in converted.modules:
        wanted = planned[converted.names[module]]
        found = adapter.tweaker(module) if module in adapter.modules else None
        if found is None or (found.act_fn, found.scaling) != (wanted.act_fn, wanted.scaling):
            raise VerificationError(f"{folder}: {module} was not written as it should be")
        same = found.parts.keys() == wanted.parts.keys() and all(
            torch.equal(found.parts[part], tensor) for part, tensor in wanted.parts.items()
        )
        if not same:
            raise VerificationError(f"{folder}: θ of {module} was not written as it should be")
    saved = {tensor.name: tensor.saved for tensor in changed_tensors(plan) if tensor.saved is not None}
    with safe_open(folder / PEFT_WEIGHTS[0], "pt") as file:
        for name in converted.saved:
            if not torch.equal(file.get_tensor(PREFIX + name), plan.head.saved_tensor(saved[converted.names[name]])):
                raise VerificationError(f"{folder}: {name} was not written as it should be")
