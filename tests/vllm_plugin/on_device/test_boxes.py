"""What part of a tensor a worker loads, by vLLM's own layers and loaders, at every rank of several sizes."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from peanut_serve.vllm_plugin.swap.boxes import BoxRecorder, box_of

HIDDEN, HEADS, GROUPS, WIDTH, INNER, VOCABULARY = 64, 8, 2, 8, 96, 256
Load = Callable[[torch.nn.Module, dict[str, Tensor]], None]
Shapes = dict[str, tuple[int, ...]]


@contextmanager
def at_rank(rank: int, size: int) -> Iterator[None]:
    """vLLM's layers are those of one worker of several."""
    with ExitStack() as stack:
        for module in (linear, parameter, vocab_parallel_embedding):
            stack.enter_context(patch.object(module, "get_tensor_model_parallel_rank", lambda: rank))
            stack.enter_context(patch.object(module, "get_tensor_model_parallel_world_size", lambda: size))
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        yield


def load_fused(layer: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    for part, tensor in tensors.items():
        layer.weight.weight_loader(layer.weight, tensor, int(part) if part.isdigit() else part)


def load_one(layer: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        own = getattr(layer, name)
        own.weight_loader(own, tensor)


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], Load, Shapes]] = {
    "qkv": (
        lambda: linear.QKVParallelLinear(HIDDEN, WIDTH, HEADS, GROUPS, bias=False),
        load_fused,
        {"q": (HEADS * WIDTH, HIDDEN), "k": (GROUPS * WIDTH, HIDDEN), "v": (GROUPS * WIDTH, HIDDEN)},
    ),
    "gate and up": (
        lambda: linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False),
        load_fused,
        {"0": (INNER, HIDDEN), "1": (INNER, HIDDEN)},
    ),
    "rows": (lambda: linear.RowParallelLinear(INNER, HIDDEN, bias=False), load_one, {"weight": (HIDDEN, INNER)}),
    "columns": (
        lambda: linear.ColumnParallelLinear(HIDDEN, INNER, bias=True),
        load_one,
        {"weight": (INNER, HIDDEN), "bias": (INNER,)},
    ),
    "replicated": (lambda: linear.ReplicatedLinear(HIDDEN, INNER, bias=False), load_one, {"weight": (INNER, HIDDEN)}),
    "embedding": (
        lambda: vocab_parallel_embedding.VocabParallelEmbedding(VOCABULARY, HIDDEN),
        load_one,
        {"weight": (VOCABULARY, HIDDEN)},
    ),
}  # fmt: skip


def parameters(layer: torch.nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in layer.parameters()]


@pytest.mark.parametrize(("rank", "size"), [(rank, size) for size in (1, 2, 4) for rank in range(size)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_worker_reads_its_box_and_nothing_else(kind: str, rank: int, size: int) -> None:
    """Loaded with NaN everywhere else, a layer gets the same weights; and the box is no larger than the shard."""
    make, load, shapes = LAYERS[kind]
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with at_rank(rank, size):
        layer, recorder = make(), BoxRecorder()
        for name, tensor in tensors.items():
            recorder.watch(name, tensor)
        with recorder:
            load(layer, tensors)
        whole = parameters(layer)
        assert recorder.boxes.keys() == tensors.keys()
        parts = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
        for name, box in recorder.boxes.items():
            parts[name][box] = tensors[name][box]
        for own in layer.parameters():
            own.data.fill_(7.0)
        load(layer, parts)
        assert all(torch.equal(a, b) for a, b in zip(whole, parameters(layer), strict=True))
    shares = {name: math.prod(part.stop - part.start for part in box) for name, box in recorder.boxes.items()}
    copies = {"k": max(1, size // GROUPS), "v": max(1, size // GROUPS)}  # heads that several workers have
    for name, tensor in tensors.items():
        share = 1 if kind == "replicated" else size // copies.get(name, 1)
        assert shares[name] == tensor.numel() // share, name


def test_boxes_of_views() -> None:
    tensor = torch.zeros(6, 10)
    assert box_of(tensor, (6, 10)) == (slice(0, 6), slice(0, 10))
    assert box_of(tensor[2:5, 3:7], (6, 10)) == (slice(2, 5), slice(3, 7))
    assert box_of(tensor.t()[3:7, 1], (6, 10)) == (slice(1, 2), slice(3, 7))
    assert box_of(tensor[4, 9], (6, 10)) == (slice(4, 5), slice(9, 10))
    assert box_of(tensor.view(-1)[5:25], (6, 10)) is None  # more than a row
    assert box_of(tensor[::2], (6, 10)) is None
    assert box_of(torch.zeros(6, 1), (6, 1)) is None  # by its strides, the two dimensions are one


def test_what_is_computed_from_a_tensor_was_read() -> None:
    """A model that loads a changed copy reads the whole; what is read in parts is the box around them."""
    recorder, tensor, other = BoxRecorder(), torch.randn(8, 4), torch.randn(8, 4)
    recorder.watch("changed", tensor)
    recorder.watch("parts", other)
    with recorder:
        (tensor.t() * 2).sum()
        other[1:3].clone()
        other[5:6, 2:].clone()
        other[:, :0].clone()
    assert recorder.boxes["changed"] == (slice(0, 8), slice(0, 4))
    assert recorder.boxes["parts"] == (slice(1, 6), slice(0, 4))


def test_memory_that_was_freed_is_another_tensors() -> None:
    """Its next owner was taken for the tensor, and all of that for read."""
    memory = bytearray(16)
    recorder = BoxRecorder()
    tensor = torch.frombuffer(memory, dtype=torch.float32).view(2, 2)
    recorder.watch("w", tensor)
    with recorder:
        tensor[:1].clone()
    del tensor
    owner = torch.frombuffer(memory, dtype=torch.float32).view(2, 2)
    with recorder:
        owner.clone()
    assert recorder.boxes == {"w": (slice(0, 1), slice(0, 2))}
