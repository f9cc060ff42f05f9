"""What went in, compared with what comes out: nothing of θ may be lost between opening an adapter and its output.

Other checks recompute the numbers that were written. These count: every module of every adapter, every tensor that
one replaces, and every tensor of the base must be in the plan; all that is in the plan must be in the output.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from converters.adapters.adapter import Adapter
from converters.errors import VerificationError
from converters.files.header import read_header
from converters.methods.lora.expert_lora import ExpertLora
from converters.plans.merge import Plan
from converters.plans.tensor import TensorPlan, Term


def check_accounts(plan: Plan, wanted: Iterable[TensorPlan], written: Iterable[str], form: str) -> None:
    """Compare the tensors that an output accounts for with the plan, and the plan with what it was made from.

    Args:
        plan: the planned merge.
        wanted: those of its tensors that the output has to have: all, or `changed_tensors`.
        written: their names, as far as they are in the output.
        form: what was written, for the message.

    Raises `VerificationError` naming what is lost.
    """
    check_plan(plan)
    _refuse_difference(Counter(tensor.name for tensor in wanted), Counter(iter(written)), form)


def check_file(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `VerificationError` unless a safetensors file has exactly these tensors, with these shapes."""
    found = {info.name: info.shape for info in read_header(file)[0]}
    _refuse_difference(Counter(shapes.keys()), Counter(found.keys()), file.name)
    for name, shape in shapes.items():
        if found[name] != tuple(shape):
            raise VerificationError(f"{file.name}: {name} was written as {found[name]}, expected {tuple(shape)}")


def changed_tensors(plan: Plan) -> list[TensorPlan]:
    """What an adapter made from the plan has to have: the updated and the replaced tensors."""
    return [tensor for tensor in plan.tensors if tensor.terms or tensor.saved is not None]


def check_plan(plan: Plan) -> None:
    """Raise `VerificationError` unless everything of the adapters and of the base is somewhere in the plan."""
    terms: dict[tuple[int, str], list[Term]] = {}
    for tensor in plan.tensors:
        for term in tensor.terms:
            terms.setdefault((term.adapter, term.module), []).append(term)
    for position, weighted in enumerate(plan.adapters):
        for module in weighted.adapter.modules:
            _check_module(weighted.adapter, module, terms.get((position, module), []))
    _check_saved(plan)
    _check_base(plan)


def _check_module(adapter: Adapter, module: str, terms: list[Term]) -> None:
    if not terms:
        raise VerificationError(
            f"{adapter.path}: θ of {module} is in none of the planned tensors; nothing was written: please report it"
        )
    described, parts = adapter.describe(module), [term.part for term in terms]
    if not isinstance(described, ExpertLora) or None in parts:
        return
    rows = sum(part.rows[1] - part.rows[0] for part in parts if part is not None)
    whole = described.transposed() if terms[0].transposed else described
    wanted = whole.experts * whole.expert_shape[0]
    if rows != wanted or len(set(parts)) != len(parts):
        raise VerificationError(
            f"{adapter.path}: the planned tensors have {rows} rows of {module}, of {wanted}; nothing was written: "
            "please report it"
        )


def _check_saved(plan: Plan) -> None:
    """Every tensor that an adapter replaces is planned, or is equal to one that is, with which it is tied."""
    head = plan.head
    planned = {tensor.saved for tensor in plan.tensors if tensor.saved is not None}
    for name in head.saved.keys() - planned:
        own = head.saved_tensor(name)
        same_shape = (other for other in planned if head.store.shapes[head.saved[other]] == tuple(own.shape))
        if not any(torch.equal(head.saved_tensor(other), own) for other in same_shape):
            raise VerificationError(
                f"{head.path}: {name} is in none of the planned tensors; nothing was written: please report it"
            )


def _check_base(plan: Plan) -> None:
    """Every tensor of the base is in the plan, is replaced, or was dropped for a reason."""
    sources = {tensor.source.name for tensor in plan.tensors if tensor.source is not None}
    replaced = [tensor.name for tensor in plan.tensors if tensor.saved is not None]
    for name in plan.base.tensors.keys() - sources - plan.dropped.keys():
        if not any(other == name or other.endswith(f".{name}") for other in replaced):
            raise VerificationError(
                f"{name} of the base is in none of the planned tensors; nothing was written: please report it"
            )


def _refuse_difference(wanted: Counter[str], found: Counter[str], form: str) -> None:
    if wanted == found:
        return
    lost, extra = sorted((wanted - found).elements()), sorted((found - wanted).elements())
    raise VerificationError(
        f"{form}: {_listed(lost)} missing, {_listed(extra)} too many, of {wanted.total()} planned; nothing was "
        "written: please report it"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)}{f' ({names[0]})' if names else ''}"
