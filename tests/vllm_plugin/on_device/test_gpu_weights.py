"""W0 on a GPU, and what is evaluated there: `pytest -m gpu`, on a machine that has one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.paths import ROOT
from support.rounding import tolerance
from support.tiny_models import Pair, save_adapter, tiny_llama

from converters import merge
from converters.files.header import read_header
from converters.files.reader import TensorReader
from converters.models.checkpoint import open_checkpoint
from peanut_serve.variants.on_device.factors import arithmetic_of
from peanut_serve.variants.on_device.places import UpdatedTensor
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import LoadedModel
from peanut_serve.vllm_plugin.swap.kept import KeptWeights, evaluate
from peanut_serve.vllm_plugin.swap.mapping import StagedFactors

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once(dtype: torch.dtype) -> None:
    """Also where products of float32 may be computed in TF32."""
    torch.manual_seed(0)
    w0, wide = torch.randn(3000, 2000).to(dtype), arithmetic_of(dtype)
    up, down = torch.randn(3000, 32).to(wide), (torch.randn(32, 2000) / 32).to(wide)
    found = torch.empty_like(w0, device=GPU)
    torch.set_float32_matmul_precision("high")
    try:
        evaluate(w0.to(GPU), up.to(GPU), down.to(GPU), found)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = w0.double() + up.double() @ down.double()
    right = exact.to(dtype)
    magnitudes = w0.double().abs() + up.double().abs() @ down.double().abs()
    lost = magnitudes * 35 * 2.0 ** (-24 if wide is torch.float32 else -53)
    assert bool(((found.cpu().double() - exact).abs() <= (right.double() - exact).abs() + lost).all())
    assert (found.cpu() != right).double().mean() < 1e-2


def test_a_variant_is_what_the_host_evaluates(tmp_path: Path) -> None:
    """The factors travel in one copy; W0 is restored bit for bit."""
    pair = Pair(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=512, intermediate_size=1024, num_attention_heads=8).to(torch.bfloat16)
    model.save_pretrained(pair.base)
    save_adapter(model, pair.adapter, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=16)
    merge(pair.base, pair.adapter, pair.output)
    base, merged = open_checkpoint(pair.base), open_checkpoint(pair.output)
    opener = VersionOpener(LoadedModel(base, [[name] for name in base.tensors]), "cpu", keeps_base=True)
    weights = adapter_version("v", pair.adapter, opener).evaluate()
    places = [place for place in weights.places.values() if isinstance(place, UpdatedTensor)]
    assert len(places) == len(weights.places)
    kept, staging = KeptWeights(GPU, {}), StagedFactors(GPU)
    infos = [place.base for place in places]
    assert kept.free() > kept.needed(infos)
    before = torch.cuda.memory_allocated()
    kept.keep(infos)
    assert torch.cuda.memory_allocated() - before >= kept.nbytes == sum(info.nbytes for info in infos)
    staging.stage(places)
    differ = count = 0
    with staging.factors(places) as factor, TensorReader() as reader:
        for place in places:
            found = kept.updated(place.base, factor(place.up), factor(place.down)).cpu()
            wanted = reader.whole(merged.tensors[place.name])
            assert bool(((found.double() - wanted.double()).abs() <= tolerance(wanted)).all()), place.name
            differ, count = differ + int((found != wanted).sum()), count + wanted.numel()
            assert torch.equal(kept.whole(place.base).cpu(), reader.whole(place.base))
    assert differ < 1e-2 * count
    kept.check()
    weights.close()


def test_a_shard_has_nan_around_it(tmp_path: Path) -> None:
    save_file({"w0": torch.ones(64, 64)}, tmp_path / "w0.safetensors")
    info = read_header(tmp_path / "w0.safetensors")[0][0]
    kept = KeptWeights(GPU, {"w0": (slice(16, 32), slice(0, 64))})
    kept.keep([info])
    whole = kept.whole(info)
    assert whole.device.type == "cuda"
    assert bool((whole[16:32] == 1).all())
    assert int(whole.isnan().sum()) == 48 * 64


def test_the_benchmark_runs() -> None:
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--hidden",
        "512",
        "--inner",
        "1024",
        "--layers",
        "2",
        "--runs",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.cuda.get_device_name() in done.stdout
    last = (ROOT / "build" / "bench" / "gpu.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["part"] == "swap"
