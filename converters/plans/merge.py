"""What will happen to each tensor of a merge. Everything that can be refused is refused here."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from converters.adapters.adapter import Adapter, Weighted
from converters.adapters.base_record import check_base
from converters.adapters.embedded_base import check_embedded
from converters.errors import OptionError, QuantizedBaseError
from converters.files.header import FLOAT_DTYPES, INTEGER_DTYPES, TensorInfo
from converters.files.reader import TensorReader
from converters.methods.base import Method
from converters.methods.weight_delta import WeightDelta
from converters.models import config as model_config
from converters.models.checkpoint import Checkpoint
from converters.models.companions.companion import Companions
from converters.plans.beside_weights.companions import companions_of
from converters.plans.beside_weights.tokens import settle_pad_token, token_notes
from converters.plans.bias import refuse_missing_biases, through_weight, weight_of
from converters.plans.conflicts import refuse_conflicts, refuse_weights, settle_layout
from converters.plans.orientation import is_transposed, with_shapes
from converters.plans.other_class.finding import find_targets
from converters.plans.parts import part_of, part_term
from converters.plans.shards import shard_tensors
from converters.plans.targets import Target, Targets, find_head
from converters.plans.tensor import Action, TensorPlan, Term
from converters.plans.trained_base.trained import as_trained

DTYPE_OPTIONS = {"auto": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Plan:
    """A merge that can be carried out."""

    base: Checkpoint
    adapters: tuple[Weighted, ...]
    shards: Mapping[str, tuple[TensorPlan, ...]]  # file name -> tensors in file order
    dropped: Mapping[str, str]  # base tensor -> why it is left out
    config: Mapping[str, Any]
    options: Mapping[str, Any]  # what was chosen, for the manifest
    notes: tuple[str, ...]
    companions: Companions = field(default_factory=Companions)  # what lies beside the weights

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """All tensors of the output."""
        return tuple(tensor for shard in self.shards.values() for tensor in shard)

    @property
    def head(self) -> Adapter:
        """The adapter that replaces tensors as a whole; the first if none does."""
        return self.adapters[find_head([weighted.adapter for weighted in self.adapters])].adapter

    @property
    def name(self) -> str:
        """The adapters' names, joined."""
        return "-".join(weighted.adapter.name for weighted in self.adapters)

    @property
    def default_output(self) -> Path:
        """`./<base>-<adapter>`; `./<adapter>-merged` where the base is inside the adapter."""
        return Path(f"{self.name}-merged" if self.base.holder is not None else f"{self.base.name}-{self.name}")

    def delta_of(self, term: Term) -> WeightDelta:
        """What one update adds to a tensor as it is stored, times the weight of its adapter in the sum."""
        weighted = self.adapters[term.adapter]
        method = weighted.adapter.method(term.module)
        if term.beside:
            with TensorReader() as reader:
                weight, *bias = map(reader.whole, term.beside)
            method = method.on_module(weight.T if term.transposed else weight, bias[0] if bias else None)
        if term.parameter == "bias":
            wide = method.with_parts(method.parts_on("cpu", torch.float64))
            found = wide.bias if term.weight is None else _through_weight(wide, term)
            if found is None:
                raise ValueError(f"{term.module}: {method.name} does not change the bias")
            return found.times(weighted.weight)
        delta = method.times(weighted.weight)
        if term.part is not None:
            return part_of(delta, term.part, term.transposed)
        return delta.transposed() if term.transposed else delta

    def deltas_of(self, tensor: TensorPlan) -> list[WeightDelta]:
        """All updates of a tensor, in float64 on the CPU: what it is verified against."""
        return [self.delta_of(term).to("cpu", torch.float64) for term in tensor.terms]

    def sharing(self, shared: Collection[str]) -> "Plan":
        """The same plan with the base tensors `shared`, which several outputs have in common, in separate files."""
        limit = self.options["max_shard_size"]
        return replace(self, shards=shard_tensors(self.base, self.tensors, limit, shared))

    @property
    def total_size(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    *,
    dtype: str = "auto",
    max_shard_size: int | None = None,
    labels: list[str] | None = None,
    force_base: bool = False,
) -> Plan:
    """Plan a merge. Reads no weights, except base weights that were saved together with θ.

    Args:
        base: the base.
        adapters: the adapters, each with its weight.
        dtype: `auto` (each tensor's own), `bf16`, `fp16` or `fp32`.
        max_shard_size: bytes; None for the base's own sharding.
        labels: class labels for a head that comes with the adapter.
        force_base: merge even if the adapter was recorded on another base.

    Raises:
        BaseMismatchError, QuantizedBaseError, TargetError, ThetaError, OptionError: see `converters.errors`.
        LayoutError: an adapter could be in two layouts, and nothing decides between them.
    """
    if dtype not in DTYPE_OPTIONS:
        raise OptionError(f"dtype {dtype!r} is unknown; expected {', '.join(DTYPE_OPTIONS)}")
    opened = [weighted.adapter for weighted in adapters]
    refuse_weights(adapters)
    notes = [note for adapter in opened for note in (*adapter.notes, *check_base(base, adapter, force_base))]
    base, more = as_trained(base, opened, dtype)
    adapters, found = find_targets(base, adapters, labels)
    opened = [weighted.adapter for weighted in adapters]
    refuse_conflicts(opened, found)
    refuse_missing_biases(opened, found)
    adapters = [with_shapes(base, weighted, position, found) for position, weighted in enumerate(adapters)]
    opened = [weighted.adapter for weighted in adapters]
    for position, adapter in enumerate(opened):
        settle_layout(base, adapter, [t for t in found.targets if t.adapter == position])
    notes += _check_embedded(base, opened, found, force_base)
    tensors = [
        *_kept(base, found, dtype),
        *_updated(base, opened, found, dtype),
        *_replaced(base, opened[find_head(opened)], found, dtype),
    ]
    output_dtype = DTYPE_OPTIONS[dtype] or _main_dtype(tensors)
    plan = Plan(
        base=base,
        adapters=tuple(adapters),
        shards=shard_tensors(base, tensors, max_shard_size),
        dropped=found.dropped,
        config=model_config.with_dtype(found.config, output_dtype),
        options={"dtype": dtype, "max_shard_size": max_shard_size, "labels": labels, "force_base": force_base},
        notes=(*notes, *more, *found.notes),
    )
    return _with_companions(plan)


def _check_embedded(base: Checkpoint, opened: Sequence[Adapter], found: Targets, force_base: bool) -> list[str]:
    """Notes of the comparison of weights of the base that the adapters contain with the base."""
    if base.stream is not None and found.embedded:
        raise OptionError(
            "stream=True: the adapter contains weights of its base, which have to be compared with the base first; "
            "leave out stream="
        )
    return check_embedded(base, opened, found.embedded, force_base) if base.holder is None else []  # else the base


def _with_companions(plan: Plan) -> Plan:
    """The plan with what lies beside the weights, and with a config that agrees with its tokenizer."""
    companions = companions_of(plan.base, [weighted.adapter for weighted in plan.adapters], plan.head)
    config, notes = settle_pad_token(plan.config, companions)
    notes += token_notes({tensor.name: tensor.shape for tensor in plan.tensors}, companions)
    return replace(plan, companions=companions, config=config, notes=(*plan.notes, *companions.notes, *notes))


def _kept(base: Checkpoint, found: Targets, dtype: str) -> Iterator[TensorPlan]:
    for output, name in found.kept.items():
        info = base.tensors[name]
        own = output in base.tensors or output.endswith(f".{name}")  # else a copy under another name
        yield TensorPlan(output, Action.KEPT if own else Action.ADDED, _dtype_of(info.dtype, dtype), info.shape, info)


def _updated(base: Checkpoint, adapters: Sequence[Adapter], found: Targets, dtype: str) -> Iterator[TensorPlan]:
    kept = set(found.kept.values())
    updates: dict[str, list[Target]] = {}
    for target in found.targets:
        updates.setdefault(target.output_name, []).append(target)
    for output_name, targets in updates.items():
        info = base.tensors[targets[0].base_name]
        if not info.is_float:
            raise QuantizedBaseError(f"{info.name} is {info.dtype}; expected a floating-point weight to merge into")
        terms = tuple(
            replace(term, beside=_beside(base, adapters[t.adapter], t, found))
            for t in targets
            for term in _terms(base, adapters[t.adapter], found, t, info)
        )
        beside = output_name not in base.tensors and info.name in kept  # a head that was tied to it
        action = Action.ADDED if beside else Action.UPDATED
        stack = len(info.shape) > 2 and any(adapters[t.adapter].is_parameter(t.module) for t in targets)
        yield TensorPlan(output_name, action, _dtype_of(info.dtype, dtype), info.shape, info, terms, is_stack=stack)


def _terms(base: Checkpoint, adapter: Adapter, found: Targets, target: Target, info: TensorInfo) -> Iterator[Term]:
    """The updates of one tensor by one adapter; θ is checked against its shape."""
    described = adapter.describe(target.module)
    if target.part is not None or adapter.is_parameter(target.module):
        yield part_term(described, target, info)
        return
    if target.parameter == "weight":
        transposed = is_transposed(base, adapter, target.module, info)
        described.check_fits(info.shape[::-1] if transposed else info.shape, info.name)
        yield Term(target.adapter, target.module, transposed)
        return
    if described.bias is not None:
        described.bias.check_fits((*info.shape, 1), info.name)
    yield Term(target.adapter, target.module, False, target.parameter)
    if described.bias_from_weight is not None:
        weight = weight_of(base, found, target)
        transposed = is_transposed(base, adapter, target.module, weight)
        yield Term(target.adapter, target.module, transposed, target.parameter, weight=weight)


def _through_weight(method: Method, term: Term) -> WeightDelta | None:
    """What a bias gets through the weight of its module, which is read here; θ is in float64."""
    columns = method.bias_from_weight
    return None if columns is None or term.weight is None else through_weight(term.weight, term.transposed, columns)


def _beside(base: Checkpoint, adapter: Adapter, target: Target, found: Targets) -> tuple[TensorInfo, ...]:
    """Weight and bias of the target's module, if its method reads both together. Raises `OptionError`."""
    method = adapter.modules[target.module].method
    if not method.reads_module:
        return ()
    if base.stream is not None:
        raise OptionError(f"stream=True: {method.name} reads weight and bias of a module together; leave out stream=")
    here = [t for t in found.targets if (t.adapter, t.module) == (target.adapter, target.module)]
    names = {t.parameter: t.base_name for t in here}
    return tuple(base.tensors[names[parameter]] for parameter in ("weight", "bias") if parameter in names)


def _replaced(base: Checkpoint, adapter: Adapter, found: Targets, dtype: str) -> Iterator[TensorPlan]:
    main = _main_dtype(base.tensors.values())
    for output, saved in found.replaced.items():
        known, stored = base.tensors.get(output), adapter.store.dtypes[adapter.saved[saved]]
        own = known.dtype if known is not None and known.is_float else main
        if not stored.is_floating_point:  # the counter of a batch norm stays what it is
            own = INTEGER_DTYPES[stored]
        shape = adapter.store.shapes[adapter.saved[saved]]
        action = Action.ADDED if known is None else Action.REPLACED
        yield TensorPlan(output, action, _dtype_of(own, dtype), shape, None, saved=saved)


def _dtype_of(own: str, option: str) -> str:
    wanted = DTYPE_OPTIONS[option]
    return wanted if wanted is not None and own in FLOAT_DTYPES else own


def _main_dtype(tensors: Iterable[TensorInfo | TensorPlan]) -> str:
    """The floating dtype of most numbers."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOAT_DTYPES:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else "F32"
