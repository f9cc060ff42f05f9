"""Write adapters as one exact LoRA adapter: once W0 is known, `f(W0; θ) = lora_B @ lora_A`. No SVD is needed.

The folder is HF PEFT's (`peft/tuners/lora/config.py`), which vLLM reads as well (`vllm/lora/peft_helper.py`). The
scale is inside the factors: `lora_alpha = r`. Ranks of summed adapters add.
"""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.adapters.base_record import write_base_record
from converters.errors import ConversionError, NonFiniteError, OutputError
from converters.evaluation.factors import rank_of, refuse_full_rank, sum_factors
from converters.evaluation.verify import FactorCheck, check_factors
from converters.evaluation.worker import find_devices
from converters.files.blocks import block_rows
from converters.files.hashing import hash_file
from converters.files.header import FLOAT_DTYPES, TensorInfo, TensorSpec
from converters.files.json_files import write_json
from converters.files.names import ADAPTER_CONFIG, MANIFEST_NAME, PEFT_WEIGHTS
from converters.files.reader import TensorReader
from converters.files.staging import check_output, staged
from converters.files.writer import ShardWriter
from converters.methods.finite import all_finite
from converters.models import config as model_config
from converters.models.architecture import build_architecture
from converters.outputs.checkpoint.draft import Advance
from converters.outputs.manifest import provenance
from converters.outputs.peft_names import PREFIX, base_facts, module_name, saved_modules, saved_tensors
from converters.plans.merge import DTYPE_OPTIONS, Plan
from converters.plans.tensor import TensorPlan

# `vllm/config/lora.py`: what --max-lora-rank takes, and the modules_to_save that vLLM serves
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_SAVED = ("classifier", "score")


@dataclass(frozen=True, eq=False)
class LoraAdapterPlan:
    """A LoRA adapter that can be written.

    Attributes:
        plan: the planned merge it was made from.
        output: folder to write.
        dtype: of the factors, as safetensors spells it.
        config: the adapter_config.json.
        modules: module name, as PEFT has it -> the weight it updates.
        saved: tensor of modules_to_save -> the tensor.
    """

    plan: Plan
    output: Path
    dtype: str
    config: Mapping[str, Any]
    modules: Mapping[str, TensorPlan]
    saved: Mapping[str, Tensor]

    @property
    def r(self) -> int:
        """The largest rank."""
        ranks: list[int] = [self.config["r"], *self.config["rank_pattern"].values()]
        return max(ranks)

    @property
    def max_lora_rank(self) -> int | None:
        """The least --max-lora-rank with which vLLM serves it; None if it serves no such rank."""
        return next((rank for rank in VLLM_RANKS if rank >= self.r), None)

    @property
    def nbytes(self) -> int:
        """Size of the weights file's tensors."""
        return sum(spec.nbytes for spec in _specs(self))

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights that have to be read."""
        return sum(tensor.source.nbytes for tensor in self.modules.values() if tensor.source is not None)


def plan_lora_adapter(plan: Plan, output: str | Path, overwrite: bool = False) -> LoraAdapterPlan:
    """Plan to write the sum of the plan's adapters as one LoRA adapter, its factors in the plan's dtype, or float32.

    Args:
        plan: a planned merge, which has held the adapters against their base and settled all names.
        output: folder to write.
        overwrite: replace an earlier output of this toolkit.

    Raises:
        ConversionError: see `as_lora`.
        OutputExistsError: the folder exists, or contains an input.
    """
    converted = as_lora(plan, Path(output))
    inputs = [plan.base.folder, *(weighted.adapter.path for weighted in plan.adapters)]
    check_output(Path(output), overwrite, inputs)
    return converted


def as_lora(plan: Plan, output: Path) -> LoraAdapterPlan:
    """A planned merge as a LoRA adapter. Looks at no output.

    Raises:
        ConversionError: LoRA cannot say what the adapter does, or vLLM could not serve it; the message says why.
    """
    arch = build_architecture(plan.config, plan.config["architectures"][0])
    modules = {module_name(arch, tensor.name): tensor for tensor in plan.tensors if tensor.terms}
    refuse_full_rank(plan, modules)
    saved = saved_tensors(plan, arch)
    whole = saved_modules(arch, saved)
    if odd := [module for module in whole if module.rsplit(".", 1)[-1] not in _VLLM_SAVED]:
        raise ConversionError(
            f"the adapter replaces {odd[0]} whole; of a LoRA adapter vLLM serves no such module but "
            f"{' and '.join(_VLLM_SAVED)}; merge it: a merged checkpoint can be served"
        )
    config = {
        **base_facts(plan, arch),
        "peft_type": "LORA",
        **_ranks({module: rank_of(plan, tensor) for module, tensor in modules.items()}),
        "target_modules": sorted(modules),
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(term.transposed for tensor in modules.values() for term in tensor.terms),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    dtype = DTYPE_OPTIONS[plan.options["dtype"]] or "F32"
    return LoraAdapterPlan(plan, output, dtype, config, modules, saved)


def write_lora_adapter(
    converted: LoraAdapterPlan,
    *,
    device: str = "auto",
    overwrite: bool = False,
    advance: Advance = lambda size: None,
) -> FactorCheck:
    """Write a planned LoRA adapter, read it back and hold a sample of its deltas against θ and the base.

    Only the weights that are updated are read. `advance` is told of their bytes.

    Raises:
        NonFiniteError: a factor does not fit the dtype.
        VerificationError: what was written is not the update.
        OutputError: it cannot be written. Whichever it is, nothing was changed.
    """
    output, plan = converted.output, converted.plan
    try:
        with staged(output, overwrite) as staging:
            check = _write_weights(converted, staging / PEFT_WEIGHTS[0], find_devices(device)[0], advance)
            labels = model_config.labels_of(plan.config) if converted.saved else None
            if labels is not None:
                write_json(staging / "labels.json", labels)
            write_base_record(staging, plan.base)
            weights = {"file": PEFT_WEIGHTS[0], "xxh3_128": hash_file(staging / PEFT_WEIGHTS[0])}
            facts = {**provenance(plan, plan.base.fingerprint), "format": "lora", "weights": weights}
            write_json(staging / MANIFEST_NAME, facts)
            write_json(staging / ADAPTER_CONFIG, dict(converted.config))
            plan.base.check_unchanged()
            for weighted in plan.adapters:
                weighted.adapter.store.check_unchanged()
    except OSError as error:
        raise OutputError(f"{output} could not be written: {error}; it is as it was before") from error
    return check


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Ranks, and alphas that make every scale 1, also for a reader that knows no patterns of alpha."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in sorted(ranks.items()) if rank != common}
    return {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}


def _write_weights(converted: LoraAdapterPlan, file: Path, device: torch.device, advance: Advance) -> FactorCheck:
    """Write factors and modules_to_save, a module at a time, and check each as it lies in the file."""
    plan, checks = converted.plan, []
    with closing(ShardWriter(file, _specs(converted), {"format": "pt"})) as writer, TensorReader() as reader:
        for name, saved in converted.saved.items():
            writer.write(PREFIX + name, 0, _rounded(name, saved, converted.dtype))
        for module, tensor in converted.modules.items():
            for name, factor in zip(_names(module), sum_factors(plan, tensor, reader, device), strict=True):
                writer.write(name, 0, _rounded(name, factor, converted.dtype))
            up, down = (_read(writer.places[name], reader) for name in _names(module))
            if tensor.terms[0].transposed:
                up, down = down.T, up.T
            deltas = plan.deltas_of(tensor)
            checks.append(check_factors(up, down, tensor, deltas, FLOAT_DTYPES[converted.dtype], reader))
            advance(tensor.source.nbytes if tensor.source else 0)
        writer.finish()
    return FactorCheck(sum(count for count, _ in checks), max(error for _, error in checks))


def _specs(converted: LoraAdapterPlan) -> list[TensorSpec]:
    """The tensors of the weights file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, tensor in converted.modules.items():
        r = rank_of(converted.plan, tensor)
        out, width = reversed(tensor.shape) if tensor.terms[0].transposed else tensor.shape
        shapes |= zip(_names(module), ((out, r), (r, width)), strict=True)
    shapes |= {PREFIX + name: tuple(saved.shape) for name, saved in converted.saved.items()}
    itemsize = FLOAT_DTYPES[converted.dtype].itemsize
    return [TensorSpec(name, converted.dtype, shape, math.prod(shape) * itemsize) for name, shape in shapes.items()]


def _names(module: str) -> tuple[str, str]:
    return f"{PREFIX}{module}.lora_B.weight", f"{PREFIX}{module}.lora_A.weight"


def _rounded(name: str, factor: Tensor, dtype: str) -> Tensor:
    rounded = factor.to(FLOAT_DTYPES[dtype]).contiguous()
    if not all_finite(rounded):
        raise NonFiniteError(
            f"{name} does not fit {dtype} (its largest number is {float(factor.abs().max()):g}); "
            "write --dtype fp32, or is this another base than it was trained on?"
        )
    return rounded


def _read(place: TensorInfo, reader: TensorReader) -> Tensor:
    return torch.cat([block.double() for block in reader.row_blocks(place, block_rows(place.row_size))])
