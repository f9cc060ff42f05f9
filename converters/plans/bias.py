"""The updates of a bias that read the weight of its module, and modules whose bias is missing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from converters.adapters.adapter import Adapter
from converters.errors import BaseMismatchError, OptionError
from converters.files.blocks import block_rows
from converters.files.header import TensorInfo
from converters.files.reader import TensorReader
from converters.methods.shift import Shift
from converters.models.checkpoint import Checkpoint
from converters.plans.targets import Target, Targets


def weight_of(base: Checkpoint, found: Targets, bias: Target) -> TensorInfo:
    """The weight of the module that a bias belongs to.

    Raises `OptionError` if the base is streamed, and the weight is in another of its files, which may be gone.
    """
    beside = (bias.adapter, bias.module, "weight")
    weight = next(t for t in found.targets if (t.adapter, t.module, t.parameter) == beside)
    info = base.tensors[weight.base_name]
    if base.stream is not None and info.file != base.tensors[bias.base_name].file:
        raise OptionError(
            f"stream=True: {bias.base_name} is computed from {info.name}, which is in another file of the base; "
            "leave out stream="
        )
    return info


# part of the name of a module -> field of a config that gives those modules biases (Llama, Qwen3, Granite, ...)
_FIELDS = {"attn": "attention_bias", "attention": "attention_bias", "mlp": "mlp_bias"}


def refuse_missing_biases(adapters: Sequence[Adapter], found: Targets) -> None:
    """Raise `BaseMismatchError` for a module whose bias θ adds to, and which has none in the base."""
    present = {(target.adapter, target.module) for target in found.targets if target.parameter == "bias"}
    for target in found.targets:
        described = adapters[target.adapter].describe(target.module)
        if (target.adapter, target.module) not in present and described.needs_bias:
            server = "PEFT's PeftModel" if described.peft is not None else "the code that trained it"
            raise BaseMismatchError(
                f"{target.module}: θ adds to the bias of this module, and the base has none beside "
                f"{target.base_name}; a merged checkpoint has no place for it. If it was trained on this base, "
                f"{_with_biases(found, target)}serve it with {server}"
            )


def _with_biases(found: Targets, target: Target) -> str:
    """How to give the base biases, if its config can say that it has any."""
    parts = target.module.split(".")
    field = next((_FIELDS[part] for name in parts for part in _FIELDS if part in name), None)
    if field is None or found.config.get(field) is not False:
        return ""
    return (
        f"give the base biases of zero, which change nothing (from_pretrained(BASE, {field}=True), then "
        "save_pretrained), and merge into that; or "
    )


def through_weight(info: TensorInfo, transposed: bool, columns: Tensor) -> Shift:
    """`W0 @ columns`, in float64, of a weight that is read block by block.

    Args:
        info: the weight.
        transposed: it is stored as (in, out).
        columns: (in, 1), in float64.
    """
    products, spreads = [], []
    with TensorReader() as reader:
        start = 0
        for block in reader.row_blocks(info, block_rows(info.row_size)):
            rows = block.double()
            left, right = (rows.T, columns[start : start + len(rows)]) if transposed else (rows, columns)
            products.append(left @ right)
            spreads.append(left.abs() @ right.abs())
            start += len(rows)
    joined = (lambda found: torch.stack(found).sum(dim=0)) if transposed else torch.cat
    return Shift(joined(products), joined(spreads))
