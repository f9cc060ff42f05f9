"""Layers that vLLM's CPU backend has packed are exchanged for the right ones, or packed anew."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.server.fake_engine import read
from torch import Tensor

from converters.files.header import TensorInfo, TensorSpec
from peanut_serve.variants.host_weights import HostWeights
from peanut_serve.variants.on_device.places import KeptTensor, Place, UpdatedTensor
from peanut_serve.vllm_plugin.swap import packed as packed_layers
from peanut_serve.vllm_plugin.swap.packed import PackedLayers

SIZE = 4 * 8 * 4  # bytes of a layer, with float32 and without its bias


class Packed(torch.nn.Module):
    """A linear layer as vLLM leaves it on the CPU: the weight is in a closure."""

    input_size, output_size = 8, 4

    def __init__(self, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.cpu_linear: Callable[[Tensor], Tensor] = lambda x: x
        if has_bias:
            self.bias = torch.nn.Parameter(torch.zeros(4), requires_grad=False)

    def load(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Pack a weight (4, 8)."""
        own = weight.clone()
        self.cpu_linear = lambda x: x @ own.T
        if bias is not None:
            self.bias.data.copy_(bias)

    def loaded(self) -> Tensor:
        return self.cpu_linear(torch.eye(8)).T


@pytest.fixture
def make_weights() -> Iterator[Callable[..., HostWeights]]:
    made: list[HostWeights] = []

    def make(**tensors: Tensor) -> HostWeights:
        specs = [TensorSpec(name, "F32", tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()]
        weights = HostWeights("test", specs)
        for name, tensor in tensors.items():
            weights.put(name, tensor)
        made.append(weights.seal())
        return weights

    yield make
    for weights in made:
        weights.close()


def load(packed: PackedLayers, layers: dict[str, Packed], places: list[Place]) -> list[str]:
    """As the worker does it; returns what was packed anew."""
    left = packed.exchange(places)
    for place in left:
        assert isinstance(place, TensorInfo)
        layers[place.name].load(
            torch.frombuffer(bytearray(read([place])[place.name]), dtype=torch.float32).view(4, 8)
        )
    into = {place.name: {id(layers[place.name])} for place in left}
    packed.remember(left, into, {id(layer): layer for layer in layers.values()})
    return [place.name for place in left]


def test_the_second_time_it_is_exchanged(make_weights: Callable[..., HostWeights]) -> None:
    torch.manual_seed(0)
    layers, packed = {"a": Packed(), "b": Packed()}, PackedLayers(1 << 20)
    truth = [{name: torch.randn(4, 8) for name in layers} for _ in range(2)]
    variants = [make_weights(**tensors) for tensors in truth]
    for turn, of in enumerate((0, 1, 0, 1, 1)):
        anew = load(packed, layers, [*variants[of].places.values()])
        assert anew == (["a", "b"] if turn < 2 else [])
        assert all(torch.equal(layers[name].loaded(), truth[of][name]) for name in layers)
    assert packed.nbytes == 4 * SIZE
    assert load(packed, layers, [variants[0].places["a"], variants[1].places["b"]]) == []
    assert torch.equal(layers["a"].loaded(), truth[0]["a"])
    packed.clear()
    assert load(packed, layers, [*variants[0].places.values()]) == ["a", "b"]


def test_what_the_server_dropped_is_dropped(make_weights: Callable[..., HostWeights]) -> None:
    """Its path may be another file's next."""
    layers, packed = {"a": Packed()}, PackedLayers(1 << 20)
    first = make_weights(a=torch.zeros(4, 8))
    file = first.tensors["a"].file
    assert load(packed, layers, [*first.places.values()]) == ["a"]
    first.close()
    second = make_weights(a=torch.ones(4, 8))
    assert second.tensors["a"].file == file  # the descriptor is used again
    assert load(packed, layers, [*second.places.values()]) == ["a"]
    assert bool((layers["a"].loaded() == 1).all())
    assert packed.nbytes == SIZE


def test_files_that_may_change_are_loaded_anew(tmp_path: Path, make_weights: Callable[..., HostWeights]) -> None:
    layers, packed = {"a": Packed()}, PackedLayers(1 << 20)
    file = tmp_path / "base"
    place = TensorInfo("a", "F32", (4, 8), file, 0, SIZE)
    for number in range(3):
        file.write_bytes(torch.full((4, 8), float(number)).numpy().tobytes())
        assert load(packed, layers, [place]) == ["a"]
        assert bool((layers["a"].loaded() == number).all())
    assert packed.nbytes == 0


def test_a_layer_of_several_tensors(make_weights: Callable[..., HostWeights]) -> None:
    """Fused, and with a bias: all of its tensors have to be those of the time before."""
    layer, packed = Packed(has_bias=True), PackedLayers(1 << 20)
    one, two = (
        make_weights(q=torch.full((2, 8), n), k=torch.full((2, 8), n), bias=torch.full((4,), n)) for n in (1.0, 2.0)
    )
    modules = {id(layer): layer}
    for weights, number in ((one, 1.0), (two, 2.0)):
        places = [*weights.places.values()]
        assert packed.exchange(places) == places
        layer.load(torch.full((4, 8), number), torch.full((4,), number))
        packed.remember(places, {name: {id(layer)} for name in weights.places}, modules)
    mixed = [one.places["q"], two.places["k"], two.places["bias"]]
    assert packed.exchange(mixed) == mixed
    assert packed.exchange([*one.places.values()]) == []
    assert bool((layer.loaded() == 1).all())
    assert layer.bias.tolist() == [1.0] * 4
    part = [two.places["q"]]
    assert packed.exchange(part) == part


def test_a_tensor_of_two_layers(make_weights: Callable[..., HostWeights]) -> None:
    """A tied embedding, which is not packed: what both are loaded from is loaded."""
    head, embedding, packed = Packed(), torch.nn.Embedding(4, 8), PackedLayers(1 << 20)
    places = [*make_weights(tied=torch.ones(4, 8)).places.values()]
    for _ in range(2):
        assert packed.exchange(places) == places
        packed.remember(places, {"tied": {id(head), id(embedding)}}, {id(head): head, id(embedding): embedding})


def test_the_limit(make_weights: Callable[..., HostWeights], monkeypatch: pytest.MonkeyPatch) -> None:
    layers, packed = {"a": Packed()}, PackedLayers(2 * SIZE)
    variants = [make_weights(a=torch.full((4, 8), float(n))) for n in range(3)]

    def again(*which: int) -> list[list[str]]:
        return [load(packed, layers, [*variants[of].places.values()]) for of in which]

    assert again(0, 1, 0, 2) == [["a"], ["a"], [], ["a"]]
    assert packed.nbytes == 2 * SIZE
    assert again(0, 2, 1, 2) == [[], ["a"], [], ["a"]]  # those that take turns do not push each other out
    assert again(*[0] * 16, 2, 2, 0, 1) == [*[[]] * 16, ["a"], [], [], ["a"]]  # 1 was not used for long
    assert packed.nbytes == 2 * SIZE
    for none in (PackedLayers(0), PackedLayers(SIZE - 1)):
        assert [load(none, layers, [*variants[0].places.values()]) for _ in range(2)] == [["a"], ["a"]]
        assert none.nbytes == 0
    monkeypatch.setattr(packed_layers, "available_memory", lambda: 1 << 30)
    short = PackedLayers(1 << 20)
    assert [load(short, layers, [*variants[0].places.values()]) for _ in range(2)] == [["a"], ["a"]]


def test_w0_and_factors_have_identities(make_weights: Callable[..., HostWeights]) -> None:
    layer, packed = Packed(), PackedLayers(1 << 20)
    info = TensorInfo("a", "F32", (4, 8), Path("/nonexistent"), 0, SIZE)
    parts = make_weights(up=torch.zeros(4, 1), down=torch.zeros(1, 8), other=torch.zeros(1, 8)).tensors
    first: list[Place] = [KeptTensor(info)]
    second: list[Place] = [UpdatedTensor(info, parts["up"], parts["down"])]
    third: list[Place] = [UpdatedTensor(info, parts["up"], parts["other"])]
    for number, places in enumerate((first, second, third)):
        assert packed.exchange(places) == places
        layer.load(torch.full((4, 8), float(number)))
        packed.remember(places, {"a": {id(layer)}}, {id(layer): layer})
    for number, places in enumerate((first, second, third)):
        assert packed.exchange(places) == []
        assert bool((layer.loaded() == number).all())
