"""LoRA of parameters in a plan: each expert of a stored stack as a matrix of its own, and what cannot be written."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate

from converters.adapters.parameters import owner_of
from converters.errors import ConversionError
from converters.evaluation.factors import rank_of, rank_of_term
from converters.models.architecture import Architecture
from converters.models.one_name import memory_name
from converters.outputs.peft_names import FORM
from converters.plans.merge import Plan
from converters.plans.tensor import Part, TensorPlan, Term


def find_stacks(plan: Plan, arch: Architecture) -> dict[str, TensorPlan]:
    """Name in memory -> tensor, for the parameters that are adapted without their module, and stored as they are.

    Raises `ConversionError` for an update that has no place in a LoRA adapter.
    """
    found = {}
    for tensor in plan.tensors:
        inside = [term for term in tensor.terms if _sharing(plan, term) is not None]
        for term in tensor.terms:
            if term.part is not None and term.part.expert is None:
                raise ConversionError(
                    f"{term.module} is only a part of {tensor.name} of the checkpoint, and cannot be written as a "
                    "LoRA of modules; merge it, or save the base again with the names and tensors of transformers"
                )
        if inside and inside[0].part is None:
            if len(inside) < len(tensor.terms):
                raise ConversionError(
                    f"{tensor.name} is adapted as a parameter of {owner_of(inside[0].module)}, and as the weight of "
                    "a module: a LoRA adapter has one or the other; merge it"
                )
            name = memory_name(arch, tensor.name, FORM)
            if tensor.shape != arch.shapes[name]:
                raise ConversionError(
                    f"{tensor.name} has shape {tensor.shape}, and is {arch.shapes[name]} in memory, so its factors "
                    "are not those of a LoRA; merge it, or save the base again with transformers, which stores it as "
                    "it is in memory"
                )
            found[name] = tensor
    return found


def matrices(tensor: TensorPlan) -> Iterator[tuple[int, TensorPlan]]:
    """(expert, its matrix) of a parameter that is stored as a stack; a matrix is the only one of its stack."""
    count, shape = (tensor.shape[0], tensor.shape[1:]) if tensor.is_stack else (1, tensor.shape)
    source = tensor.source
    assert source is not None
    size = source.nbytes // count
    for expert in range(count):
        name = f"{tensor.name}[{expert}]" if tensor.is_stack else tensor.name
        own = replace(source, name=name, shape=shape, nbytes=size, offset=source.offset + expert * size)
        terms = tuple(replace(term, part=Part(expert, (0, shape[0]))) for term in tensor.terms)
        yield expert, replace(tensor, name=name, shape=shape, source=own, terms=terms, is_stack=False)


def columns_of(
    plan: Plan, modules: Mapping[str, TensorPlan], parts: Mapping[str, int], ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Which columns of the factors of its expert each matrix of one parameter has.

    The projections that a parameter joins share those of an update of the parameter, which has one lora_A for them;
    of any other update, each projection has columns of its own.

    Args:
        plan: the planned merge.
        modules: name of a matrix -> the matrix.
        parts: the same -> which of the projections it is.
        ranks: the same -> rank of its factors.
    """
    exact = all(rank_of(plan, tensor) == ranks[module] for module, tensor in modules.items())
    blocks: dict[str, list[tuple[Hashable, int]]] = {}
    for module, tensor in modules.items():
        if exact:
            blocks[module] = [(_sharing(plan, t) or parts[module], rank_of_term(plan, t) or 0) for t in tensor.terms]
        else:
            blocks[module] = [(parts[module], ranks[module])]
    widths: dict[Hashable, int] = {}
    for found in blocks.values():
        sums: Counter[Hashable] = Counter()
        for key, rank in found:
            sums[key] += rank
        widths |= {key: max(width, widths.get(key, 0)) for key, width in sums.items()}
    starts = dict(zip(widths, accumulate(widths.values(), initial=0), strict=False))
    return {module: tuple(_columns(found, dict(starts))) for module, found in blocks.items()}


def _columns(blocks: Iterable[tuple[Hashable, int]], starts: dict[Hashable, int]) -> Iterator[int]:
    for key, rank in blocks:
        yield from range(starts[key], starts[key] + rank)
        starts[key] += rank


def _sharing(plan: Plan, term: Term) -> tuple[int, str] | None:
    """The update of a whole parameter that a term is a part of."""
    is_parameter = plan.adapters[term.adapter].adapter.is_parameter(term.module)
    return (term.adapter, term.module) if is_parameter else None
