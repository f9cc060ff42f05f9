"""Merging on GPUs, beside the CPU: `pytest -m gpu`, on a machine that has one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import Pair, save_adapter, tiny_llama

from converters import Orientation, Tweaker, merge, merge_each
from converters import save_adapter as save_native
from converters.evaluation.worker import find_devices

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 512, "intermediate_size": 1400, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Weights of several row blocks each, in bfloat16; four orientations, of which two are of one weight."""
    torch.manual_seed(0)
    pair = Pair(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    model = tiny_llama(**SIZES, vocab_size=5000).to(torch.bfloat16)
    model.save_pretrained(pair.base)
    settings = {"scaling": 0.5, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "r": 16}
    save_adapter(model, pair.adapter, **settings)
    save_adapter(tiny_llama(**SIZES, vocab_size=5000), tmp_path / "deep", seed=3, **settings, depth=2)
    theta = torch.randn(8, 1400) / 9, torch.randn(1400, 8) / 9
    rows = Tweaker(Orientation.ROWS, *theta, act_fn="tanh", output_act_fn="sin_2pi", scaling=0.3)
    save_native(tmp_path / "rows", {"model.layers.0.mlp.down_proj": rows})
    return pair


def same_but_for_ties(a: Path, b: Path) -> None:
    """A float64 product of a GPU rounds otherwise; that shows in one number in millions, by one unit."""
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    for name, tensor in theirs.items():
        far = (ours[name].view(torch.int16).int() - tensor.view(torch.int16).int()).abs()
        assert int(far.max()) <= 1, name
        assert int(far.sum()) <= 2, name


def test_a_gpu_gives_what_the_cpu_gives(pair: Pair) -> None:
    adapters = [pair.adapter, pair.base.with_name("deep"), pair.base.with_name("rows")]
    on_gpu = merge(pair.base, adapters, pair.output, device="cuda")
    on_cpu = merge(pair.base, adapters, pair.output.with_name("cpu"), device="cpu")
    assert on_gpu.verification is not None
    assert on_cpu.verification is not None
    assert on_gpu.verification.recomputed == on_cpu.verification.recomputed > 0  # by the CPU, in float64
    same_but_for_ties(on_gpu.output, on_cpu.output)


def test_several_outputs_at_once(pair: Pair) -> None:
    adapters = [pair.adapter, pair.base.with_name("rows")]
    for result in merge_each(pair.base, adapters, pair.output, device="auto", share=True):
        alone = merge(
            pair.base, result.plan.adapters, pair.output.with_name(f"alone-{result.output.name}"), device="cuda"
        )
        weights = {file.name for file in alone.output.glob("*.safetensors")}
        assert weights == {"model.safetensors"}
        both = {k: v for file in result.output.glob("*.safetensors") for k, v in load_file(file).items()}
        wanted = load_file(alone.output / "model.safetensors")
        assert both.keys() == wanted.keys()
        assert all(torch.equal(both[name], wanted[name]) for name in wanted)


def test_two_workers_for_every_gpu() -> None:
    devices = find_devices("auto")
    assert len(devices) == 2 * torch.cuda.device_count()
    assert set(devices) == {torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    assert len(find_devices("cuda:0")) == 2
