"""Write a planned LoRA adapter: a module at a time, each checked as it lies in the file.

Once W0 is known, `f(W0; θ) = lora_B @ lora_A`, and no SVD is needed. A module that has no such factors, or too many,
gets the truncated SVD of its delta, if that was asked for.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.adapters.base_record import write_base_record
from converters.adapters.targeting import PREFIX
from converters.errors import NonFiniteError, VerificationError
from converters.evaluation.accounting import changed_tensors, check_accounts, check_file
from converters.evaluation.factors import rank_of, sum_factors
from converters.evaluation.precision import EVALUATION_DTYPE
from converters.evaluation.truncation import check_truncation, sum_delta, truncate, truncate_factors
from converters.evaluation.verify import FactorCheck, check_factors
from converters.evaluation.worker import find_devices
from converters.files.blocks import block_rows
from converters.files.header import FLOAT_DTYPES, TensorInfo
from converters.files.json_files import write_json
from converters.files.names import ADAPTER_CONFIG, MANIFEST_NAME, PEFT_WEIGHTS
from converters.files.reader import TensorReader
from converters.files.writer import ShardWriter
from converters.methods.factors import Factors
from converters.methods.finite import all_finite
from converters.models import config as model_config
from converters.models.companions.companion import Companions
from converters.outputs.base import Advance, WriteOptions
from converters.outputs.lora.approximation import Approximation, ModuleError
from converters.outputs.lora.biases import bias_delta, check_bias
from converters.outputs.lora.experts import ExpertGroup
from converters.outputs.lora.plan import LoraAdapterPlan, bias_name, factor_names, module_shape
from converters.outputs.manifest import provenance, weights_entry
from converters.outputs.publishing import publishing
from converters.plans.beside_weights.companions import own_companions


@dataclass(frozen=True)
class LoraCheck(FactorCheck):
    """How well it was checked; `max_error` is that of exact factors.

    Attributes:
        approximation: how well it approximates, if a rank was given.
    """

    approximation: Approximation | None = None


@dataclass(frozen=True, eq=False)
class _Written:
    """One module: its factors in float64, what they lost, and how they were checked."""

    lost: ModuleError
    recomputed: int = 0
    max_error: float = 0.0


def write_lora_adapter(
    converted: LoraAdapterPlan,
    *,
    device: str = "auto",
    overwrite: bool = False,
    companions: bool = True,
    advance: Advance = lambda size: None,
) -> LoraCheck:
    """Write a planned LoRA adapter, read it back and compare its deltas with what θ and the base give.

    Only the weights that are updated are read; `advance` is called with their bytes. Of exact factors, a sample of
    the deltas is recomputed; of approximations, whole deltas. Without `companions`, the tokenizer and other
    files that lie beside the adapter are not copied.

    Raises:
        ConversionError: an approximation loses more than the options allow.
        NonFiniteError: a factor does not fit the dtype.
        VerificationError: what was written is not the update.
        OutputError: a file could not be written. Whichever error it is, no existing output was changed.
    """
    output, plan = converted.output, converted.plan
    with publishing({output: [plan]}, WriteOptions(overwrite=overwrite)) as folders:
        staging = folders[output]
        check = _write_weights(converted, staging / PEFT_WEIGHTS[0], find_devices(device)[0], advance)
        labels = model_config.labels_of(plan.config) if converted.saved else None
        if labels is not None:
            write_json(staging / "labels.json", labels)
        write_base_record(staging, plan.base)
        beside = own_companions(plan.head) if companions else Companions()
        beside.write(staging)
        facts = {
            **provenance(plan, plan.base.fingerprint),
            "format": "lora",
            "weights": weights_entry(staging / PEFT_WEIGHTS[0]),
            "companions": beside.facts(),
            **({"approximation": check.approximation.facts()} if check.approximation else {}),
            **({"vllm_refuses": list(converted.vllm_refuses)} if converted.vllm_refuses else {}),
        }
        write_json(staging / MANIFEST_NAME, facts)
        write_json(staging / ADAPTER_CONFIG, dict(converted.config))
    return check


def _write_weights(converted: LoraAdapterPlan, file: Path, device: torch.device, advance: Advance) -> LoraCheck:
    with closing(ShardWriter(file, converted.specs, {"format": "pt"})) as writer, TensorReader() as reader:
        for name in converted.saved:
            _write_saved(converted, name, writer, reader)
        biases = sum(_write_bias(converted, module, writer, reader) for module in converted.modules)
        modules = list(_write_modules(converted, writer, reader, device, advance))
        writer.finish()
    _check_accounts(converted, file)
    approximation = Approximation.of((one.lost for one in modules), converted.options)
    recomputed = biases + sum(one.recomputed for one in modules)
    return LoraCheck(recomputed, max(one.max_error for one in modules), approximation)


def _write_modules(
    converted: LoraAdapterPlan, writer: ShardWriter, reader: TensorReader, device: torch.device, advance: Advance
) -> Iterator[_Written]:
    """Write the factors of each module, and check them."""
    for group in converted.groups:
        yield from _write_group(converted, group, writer, reader, device, advance)
    for module, tensor in converted.apart.items():
        up, down, lost = _factors(converted, module, reader, device)
        for name, factor in zip(factor_names(module), (up, down), strict=True):
            writer.write(name, 0, _rounded(name, factor, converted.dtype))
        written_up, written_down = (_read(writer.places[name], reader) for name in factor_names(module))
        yield _check(converted, module, lost, (written_up, written_down), reader)
        advance(tensor.source.nbytes if tensor.source else 0)


def _write_group(
    converted: LoraAdapterPlan,
    group: ExpertGroup,
    writer: ShardWriter,
    reader: TensorReader,
    device: torch.device,
    advance: Advance,
) -> Iterator[_Written]:
    """Write the joined factors of experts, and check those of each in them."""
    found = {module: _factors(converted, module, reader, device) for module in group.places}
    joined = group.join({module: (up, down) for module, (up, down, _) in found.items()})
    for name, factor in zip(factor_names(group.key), joined, strict=True):
        writer.write(name, 0, _rounded(name, factor, converted.dtype))
    up, down = (_read(writer.places[name], reader) for name in factor_names(group.key))
    for module, (_, _, lost) in found.items():
        yield _check(converted, module, lost, group.factors_of(module, up, down), reader)
        source = converted.modules[module].source
        advance(source.nbytes if source else 0)


def _factors(
    converted: LoraAdapterPlan, module: str, reader: TensorReader, device: torch.device
) -> tuple[Tensor, Tensor, ModuleError]:
    """lora_B and lora_A of one module in float64 on the CPU, and what they lack."""
    plan, tensor, rank = converted.plan, converted.modules[module], converted.ranks[module]
    out, width = module_shape(tensor)
    exact = rank_of(plan, tensor)
    if exact == rank:
        up, down = sum_factors(plan, tensor, reader, device)
        return up, down, ModuleError(module, Factors(up, down).norm())
    if rank == min(out, width):  # the delta itself, beside a unit matrix
        delta, unit = sum_delta(plan, tensor, reader, device).cpu(), torch.eye(rank, dtype=EVALUATION_DTYPE)
        lost = ModuleError(module, float(delta.norm()))
        return (unit, delta, lost) if out <= width else (delta, unit, lost)
    if exact is not None and exact <= min(out, width):
        found = truncate_factors(*sum_factors(plan, tensor, reader, device), rank)
    else:
        found = truncate(sum_delta(plan, tensor, reader, device), rank)
    return (
        found.up,
        found.down,
        ModuleError(module, found.norm, found.lost, found.rank_for(converted.options.max_error)),
    )


def _check(
    converted: LoraAdapterPlan, module: str, lost: ModuleError, read: tuple[Tensor, Tensor], reader: TensorReader
) -> _Written:
    """Compare the factors of one module, as they lie in the file, with what θ and the base give."""
    if lost.error > converted.options.max_error:  # nothing of it will be published
        return _Written(lost)
    tensor = converted.modules[module]
    up, down = read
    if tensor.is_transposed:
        up, down = down.T, up.T
    deltas, dtype = converted.plan.deltas_of(tensor), FLOAT_DTYPES[converted.dtype]
    if not lost.lost:
        return _Written(lost, *check_factors(up, down, tensor, deltas, dtype, reader))
    recomputed, found = check_truncation(up, down, tensor, deltas, dtype, reader, lost.error)
    return _Written(ModuleError(module, lost.norm, lost.lost, lost.rank_for, found), recomputed)


def _check_accounts(converted: LoraAdapterPlan, file: Path) -> None:
    """Compare what is in the file with what the adapters have, see `accounting.py`."""
    plan = converted.plan
    stacks = [group for group in converted.groups if group.stack is not None]
    inside = {name for group in stacks for name in group.places}
    own = [tensor.name for module, tensor in converted.modules.items() if module not in inside]
    own += [tensor.name for tensor in converted.biases.values()]
    own += [str(group.stack) for group in stacks]
    own += [converted.saved_names[name] for name in converted.saved]
    check_accounts(plan, changed_tensors(plan), own, "the LoRA adapter")
    check_file(file, {spec.name: spec.shape for spec in converted.specs})


def _write_saved(converted: LoraAdapterPlan, name: str, writer: ShardWriter, reader: TensorReader) -> None:
    """Write a tensor that the adapter replaces, and compare it as it lies in the file."""
    plan, planned, tensor = converted.plan, converted.saved_names[name], converted.saved[name]
    counts = not tensor.is_floating_point()  # of a batch norm
    writer.write(PREFIX + name, 0, tensor if counts else _rounded(name, tensor, converted.dtype))
    saved = plan.head.saved_tensor(str(next(one.saved for one in plan.tensors if one.name == planned)))
    wanted = saved if counts else _rounded(name, saved, converted.dtype)
    if not torch.equal(reader.whole(writer.places[PREFIX + name]), wanted):
        raise VerificationError(f"{name} was not written as it should be")


def _write_bias(converted: LoraAdapterPlan, module: str, writer: ShardWriter, reader: TensorReader) -> int:
    """Write the bias of one lora_B, if there are any, and check it; returns how many numbers were recomputed."""
    if not converted.biases:
        return 0
    name, tensor = bias_name(module), converted.biases.get(module)
    if tensor is None:
        out = module_shape(converted.modules[module])[0]
        writer.write(name, 0, torch.zeros(out, dtype=FLOAT_DTYPES[converted.dtype]))
        return 0
    writer.write(name, 0, _rounded(name, bias_delta(converted.plan, tensor, reader), converted.dtype))
    found = reader.whole(writer.places[name]).double()
    return check_bias(found, converted.plan, tensor, FLOAT_DTYPES[converted.dtype], reader)


def _rounded(name: str, factor: Tensor, dtype: str) -> Tensor:
    rounded = factor.to(FLOAT_DTYPES[dtype]).contiguous()
    if not all_finite(rounded):
        raise NonFiniteError(
            f"{name} does not fit {dtype} (its largest number is {float(factor.abs().max()):g}); write it with "
            "dtype='fp32', and check that this is the base the adapter was trained on"
        )
    return rounded


def _read(place: TensorInfo, reader: TensorReader) -> Tensor:
    return torch.cat([block.double() for block in reader.row_blocks(place, block_rows(place.row_size))])
