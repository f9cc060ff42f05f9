"""Parameters that are adapted without their module, and weights that transformers fuses or splits while loading."""

import re
from collections.abc import Iterator, Mapping, Sequence

from converters.adapters.adapter import Adapter
from converters.adapters.parameters import is_named, owners
from converters.errors import AdapterConfigError, BaseMismatchError, TargetError
from converters.files.header import TensorInfo
from converters.methods.base import Method
from converters.methods.lora.expert_lora import ExpertLora, rows_of
from converters.methods.weight_delta import WeightDelta
from converters.models.architecture import Architecture
from converters.plans.placed import Placed
from converters.plans.targets import Target, not_found, refuse_untrained
from converters.plans.tensor import Part, Term

# before, in and out of parameters (experts, out, in) were swapped (`peft/tuners/lora/layer.py`)
_SWAPPED_UNTIL = (0, 19, 1)
_UNCLEAR_BEFORE = ((0, 19, 1), (0, 20, 0))  # versions of the development between
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)([^@]*)(@.*)?")

Shapes = Mapping[str, tuple[int, ...]]


def place_parameters(
    position: int, adapter: Adapter, arch: Architecture, sources: Mapping[str, Sequence[str]], stored: Shapes
) -> Iterator[Target]:
    """The targets of an adapter's `target_parameters`.

    Args:
        position: of the adapter.
        adapter: the adapter.
        arch: the architecture.
        sources: tensor in memory -> the tensors of the base it is made from.
        stored: shapes of the base's tensors.

    Raises:
        TargetError: the model has no such parameter, or transformers makes it in a way that is not known here.
        ThetaError: a parameter that should have θ has none.
        BaseMismatchError: the base does not have the shape θ was trained for.
        AdapterConfigError: the shape does not show what is in and out, and nothing else does.
    """
    named = [name for name in arch.shapes if is_named(name, adapter.target_parameters)]
    adapted = set()
    for owner, wrappers in owners(filter(adapter.is_parameter, adapter.modules), adapter.target_parameters).items():
        own = arch.module(owner)
        parameters = [name for name in named if name.rpartition(".")[0] == own]
        if len(parameters) != len(wrappers):
            if not parameters:
                raise not_found(owner, {name.rpartition(".")[0] for name in arch.shapes}, f"the base ({arch.name})")
            raise TargetError(
                f"the adapter has θ for {len(wrappers)} parameters of {owner}, the base ({arch.name}) has "
                f"{', '.join(parameters)} that its target_parameters name; is this the base it was trained on?"
            )
        adapted |= set(parameters)
        for module, parameter in zip(reversed(wrappers), parameters, strict=True):
            transposed = _is_transposed(adapter, module, parameter, arch)
            _check_complete(parameter, arch, sources.get(parameter, ()))
            for source in sources.get(parameter, ()):
                is_swapped = _is_swapped(arch, source, stored[source], parameter)
                is_part = arch.converted(source) and is_swapped is None
                part = _expert_part(arch, source, stored[source], parameter) if is_part else None
                yield Target(position, module, source, source, part=part, transposed=transposed != bool(is_swapped))
    refuse_untrained(adapter, sorted(set(named) - adapted))


def _is_transposed(adapter: Adapter, module: str, parameter: str, arch: Architecture) -> bool:
    """Whether a parameter is (experts, in, out) for θ; checks its shape."""
    described, shape = adapter.describe(module), arch.shapes[parameter]
    assert isinstance(described, ExpertLora)
    if len(shape) == 2:
        described.check_fits(shape, parameter)
        return False
    if described.experts == 1:  # PEFT adds B·A as it is, whatever the axes of the parameter are
        described.check_fits(shape, parameter)
        return False
    plain, swapped = described, described.transposed()
    fitting = [is_swapped for is_swapped, one in ((False, plain), (True, swapped)) if _fits(one, shape)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        plain.check_fits(shape, parameter)
    if parameter.rpartition(".")[0] in arch.transposed:
        return True
    return _was_swapped(adapter, described, parameter)


def _fits(described: ExpertLora, shape: tuple[int, ...]) -> bool:
    try:
        described.check_fits(shape)
    except BaseMismatchError:
        return False
    return True


def _was_swapped(adapter: Adapter, described: ExpertLora, parameter: str) -> bool:
    """Whether the PEFT of the training swapped in and out of a parameter (experts, out, in) that is square."""
    text = described.given["peft_version"]
    found = _VERSION.fullmatch(text) if isinstance(text, str) else None
    version = tuple(map(int, found.groups()[:3])) if found is not None else None
    if found is None or version is None or (found[4] and version in _UNCLEAR_BEFORE):
        raise AdapterConfigError(
            f"{adapter.path}: the matrices of {parameter} are square, PEFT before 0.19.1 swapped their in "
            f"and out, and peft_version is {text!r}: set 'peft_version' in its adapter_config.json to the release of "
            "PEFT that trained it"
        )
    return version < _SWAPPED_UNTIL


def _is_swapped(arch: Architecture, source: str, stored: tuple[int, ...], parameter: str) -> bool | None:
    """Whether a tensor has the last two axes of its parameter swapped; None if it is no tensor that may have."""
    found, shape = arch.conversion(source) if arch.converted(source) else None, arch.shapes[parameter]
    if found is None or not found.swaps:
        return None
    if stored not in (shape, (shape[0], shape[2], shape[1])):
        raise BaseMismatchError(f"{source} has shape {stored}; expected {shape}, or its last two axes swapped")
    return stored != shape


def _expert_part(arch: Architecture, source: str, shape: tuple[int, ...], parameter: str) -> Part:
    """Which part of a parameter (experts, a, b) the tensor of one expert is."""
    found, whole = arch.conversion(source), arch.shapes[parameter]
    if found is None or found.expert is None:
        raise TargetError(
            f"{parameter}: transformers makes it from {source} of the checkpoint in a way that is not supported; "
            "load and save the base with transformers, and merge into that"
        )
    rows = whole[1] // found.parts
    if shape != (rows, whole[2]) or found.expert >= whole[0]:
        raise BaseMismatchError(f"{source} has shape {shape}; expected one of {whole[0]} experts, {(rows, whole[2])}")
    return Part(found.expert, (found.part * rows, (found.part + 1) * rows))


def _check_complete(parameter: str, arch: Architecture, sources: Sequence[str]) -> None:
    """Check that the base has all of a parameter."""
    converted = [arch.conversion(source) for source in sources if arch.converted(source)]
    first = converted[0] if converted else None
    wanted = 1 if first is None or first.swaps else arch.shapes[parameter][0] * first.parts
    if len(sources) != wanted:
        raise BaseMismatchError(
            f"the base has {len(sources)} tensors for {parameter}, expected {wanted}; a part of it is missing"
        )


def split_part(module: str, target: str, source: str, shape: tuple[int, ...], arch: Architecture) -> Part:
    """Which rows of a stored tensor the weight of a module is, which transformers splits from it.

    Raises `TargetError` if transformers makes the weight in another way.
    """
    found = arch.conversion(source)
    if found is None or target not in found.targets or len(found.targets) == 1 or len(shape) != 2:
        raise TargetError(
            f"{module}: transformers builds this weight by fusing or splitting {source} of the checkpoint, and "
            "a merge into such a tensor is not supported; adapt a module that is stored as it is"
        )
    rows = shape[0] // len(found.targets)
    if arch.shapes[target] != (rows, shape[1]):
        raise BaseMismatchError(f"{source} has shape {shape}; expected {len(found.targets)} of {arch.shapes[target]}")
    index = found.targets.index(target)
    return Part(None, (index * rows, (index + 1) * rows), shape[0])


def part_term(described: Method, target: Target, info: TensorInfo) -> Term:
    """The update of a tensor that is a part of what a module adapts, or has it as a part."""
    if isinstance(described, ExpertLora):
        return Term(target.adapter, target.module, target.transposed, part=target.part)
    assert target.part is not None
    if described.reads_module:
        raise TargetError(
            f"{target.module} is only a part of {info.name} of the checkpoint, and {described.name} needs its weight "
            "and bias together; save the base again with the tensors of transformers"
        )
    start, stop = target.part.rows
    described.check_fits((stop - start, *info.shape[1:]), info.name)
    return Term(target.adapter, target.module, False, part=target.part)


def part_of(delta: WeightDelta, part: Part, transposed: bool) -> WeightDelta:
    """What a tensor gets of the delta of a module, of which it is a part, or which is a part of it."""
    if part.expert is None:
        return Placed(delta, *part.rows, part.height)
    assert isinstance(delta, ExpertLora)
    whole = delta.transposed() if transposed else delta
    return rows_of(whole.expert(part.expert), *part.rows)
