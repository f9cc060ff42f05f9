"""W0 on a worker's device, and what is evaluated there: compared with float64, and with what the host evaluates."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.rounding import tolerance
from support.server.fake_engine import read
from support.tiny_models import Pair, tiny_llama
from torch import Tensor

from converters import merge
from converters.files.header import TensorInfo, read_header
from converters.models.checkpoint import open_checkpoint
from peanut_serve.variants.on_device.factors import arithmetic_of
from peanut_serve.variants.on_device.places import KeptTensor, Place, UpdatedTensor, decode_places, encode_places
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel, places_of
from peanut_serve.vllm_plugin.swap.boxes import Box
from peanut_serve.vllm_plugin.swap.kept import KeptWeights, KeptWeightsError, evaluate
from peanut_serve.vllm_plugin.swap.mapping import StagedFactors
from peanut_serve.vllm_plugin.swap.worker import VariantWorker

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def saved(folder: Path, **tensors: Tensor) -> dict[str, TensorInfo]:
    save_file(tensors, folder / "w0.safetensors")
    return {info.name: info for info in read_header(folder / "w0.safetensors")[0]}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype, scale: float) -> None:
    """As near to the exact sum as its rounding is, but for what float32 or float64 lose; almost always the same."""
    torch.manual_seed(0)
    w0, wide = torch.randn(300, 200).to(dtype), arithmetic_of(dtype)
    up, down = (torch.randn(300, 24) * scale).to(wide), (torch.randn(24, 200) / 24).to(wide)
    found = torch.empty_like(w0)
    evaluate(w0, up, down, found)
    exact = w0.double() + up.double() @ down.double()
    right = exact.to(dtype)
    magnitudes = w0.double().abs() + up.double().abs() @ down.double().abs()
    lost = magnitudes * (24 + 3) * 2.0 ** (-24 if wide is torch.float32 else -53)
    assert bool(((found.double() - exact).abs() <= (right.double() - exact).abs() + lost).all())
    assert (found != right).double().mean() < 1e-2


def test_it_is_not_computed_in_less_than_float32() -> None:
    """vLLM sets the precision of products for its own."""
    torch.manual_seed(0)
    w0, up, down = torch.zeros(64, 64, dtype=torch.bfloat16), torch.randn(64, 512), torch.randn(512, 64)
    found, again = torch.empty_like(w0), torch.empty_like(w0)
    evaluate(w0, up, down, found)
    torch.set_float32_matmul_precision("medium")
    try:
        evaluate(w0, up, down, again)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, again)


@pytest.mark.parametrize("box", [(slice(0, 6), slice(0, 8)), (slice(2, 4), slice(0, 8)), (slice(0, 6), slice(4, 8))])
def test_a_shard_is_that_of_the_whole(tmp_path: Path, box: Box) -> None:
    torch.manual_seed(0)
    w0, up, down = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(6, 2), torch.randn(2, 8)
    info = saved(tmp_path, w0=w0)["w0"]
    whole, part = KeptWeights(CPU, {}), KeptWeights(CPU, {"w0": box})
    for kept in (whole, part):
        kept.keep([info])
    assert part.nbytes == w0[box].numel() * 2
    outside = torch.ones(6, 8, dtype=torch.bool)
    outside[box] = False
    for found, wanted in (
        (part.whole(info), w0),
        (part.updated(info, up, down), whole.updated(info, up, down)),
    ):
        assert found.shape == w0.shape
        assert torch.equal(found[box], wanted[box])
        assert bool(found[outside].isnan().all())
    part.check()
    assert torch.equal(part.whole(info)[box], w0[box])  # an update changes no copy


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    infos = saved(tmp_path, a=torch.full((4, 4), 6e4, dtype=torch.float16), b=torch.zeros(4, 4, dtype=torch.float16))
    kept = KeptWeights(CPU, {})
    kept.keep([*infos.values()])
    one = torch.ones(4, 1), torch.ones(1, 4)
    kept.updated(infos["b"], *one)
    kept.updated(infos["a"], one[0] * 1e4, one[1])
    with pytest.raises(KeptWeightsError, match=r"a: W0 \+ up @ down does not fit its dtype"):
        kept.check()
    kept.check()  # it told it once
    with pytest.raises(KeptWeightsError, match="has no copy of c"):
        kept.whole(TensorInfo("c", "F16", (4, 4), tmp_path, 0, 32))


def test_room(tmp_path: Path) -> None:
    info = saved(tmp_path, w0=torch.zeros(1 << 11, 1 << 10))["w0"]
    kept, half = KeptWeights(CPU, {}), KeptWeights(CPU, {"w0": (slice(0, 1 << 10), slice(0, 1 << 10))})
    assert kept.needed([info]) - half.needed([info]) == info.nbytes // 2 + info.nbytes // 4  # and their factors
    assert kept.free() > kept.needed([info]) > info.nbytes
    kept.keep([info])
    assert (kept.needed([info]), kept.nbytes) == (0, info.nbytes)


class Worker(VariantWorker):
    """A worker without vLLM: `reload_weights` keeps what it is given."""

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}
        self.model_runner = self
        self.reload_weights = self._reload

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def _reload(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in weights_iterator}


MakePair = Callable[..., Pair]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_variant_is_what_the_host_evaluates(make_pair: MakePair, dtype: torch.dtype) -> None:
    """But for what float32 loses; and the base is restored bit for bit."""
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    pair = make_pair(tiny_llama(hidden_size=128, intermediate_size=256), dtype, target_modules=targets)
    merge(pair.base, pair.adapter, pair.output)
    base, merged = open_checkpoint(pair.base), open_checkpoint(pair.output)
    opener = VersionOpener(LoadedModel(base, [[name] for name in base.tensors]), "cpu", keeps_base=True)
    version = adapter_version("v", pair.adapter, opener)
    weights = version.evaluate()
    updated = [name for name, place in weights.places.items() if isinstance(place, UpdatedTensor)]
    assert {name.split(".")[-2] for name in updated} == {*targets}
    assert weights.nbytes == version.nbytes < sum(spec.nbytes for spec in version.specs) / 2
    worker = Worker()
    worker.peanut_kept, worker.peanut_staging = KeptWeights(CPU, {}), StagedFactors(CPU)
    infos = [base.tensors[name] for name in weights.places]
    assert worker.peanut_keep(encode_places(infos)) == sum(info.nbytes for info in infos)
    kept: dict[str, Place] = {info.name: KeptTensor(info) for info in infos}
    names = [*kept]
    places = list(places_of(names, weights, kept))
    assert decode_places(encode_places(places)) == places
    assert sum(place.nbytes for place in places) <= weights.nbytes
    worker.peanut_stage(encode_places(places))
    worker.peanut_apply(encode_places(places))
    wanted = read([merged.tensors[name] for name in names])
    assert worker.loaded.keys() == wanted.keys()
    differ = count = 0
    for name, raw in wanted.items():
        right = torch.frombuffer(bytearray(raw), dtype=dtype).view(merged.tensors[name].shape)
        differ, count = differ + int((worker.loaded[name] != right).sum()), count + right.numel()
        assert bool(((worker.loaded[name].double() - right.double()).abs() <= tolerance(right)).all()), name
    assert differ <= (1e-2 * count if dtype is torch.bfloat16 else 0)
    worker.peanut_apply(encode_places([*kept.values()]))
    restored = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in worker.loaded.items()}
    assert restored == read(infos)
    weights.close()


def test_a_worker_without_copies_refuses(tmp_path: Path) -> None:
    info = saved(tmp_path, w0=torch.zeros(4, 4))["w0"]
    with pytest.raises(KeptWeightsError, match="started without --base-copy device"):
        Worker().peanut_apply(encode_places([KeptTensor(info)]))
    worker = Worker()
    worker.peanut_apply(encode_places([info]))
    assert torch.equal(worker.loaded["w0"], torch.zeros(4, 4))
    with pytest.raises(ValueError, match="1 of 1 tensors are not in files"):
        worker.peanut_learn(encode_places([KeptTensor(info)]))
