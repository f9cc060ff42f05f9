"""What the fake engine computes with: its weights and the LoRA adapter of a request, as tensors; and who that is."""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from support.server.fake_engine import FakeEngine
from support.server.weights import Weights

from peanut_serve.lora.folders import LoraFolder


def effective(engine: FakeEngine, lora: LoraFolder | None, weights: Weights) -> dict[str, torch.Tensor]:
    """The weights of the engine, plus the delta of an adapter that it has loaded."""
    found = tensors(engine.weights, weights)
    if lora is None:
        return found
    assert engine.loras[lora.number] == lora.path
    factors = load_file(lora.path / "adapter_model.safetensors")
    for key in factors:
        if key.endswith(".lora_A.weight"):
            name = f"{key.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
            found[name] = found[name] + factors[key.replace("lora_A", "lora_B")] @ factors[key]
    return found


def tensors(data: Mapping[str, bytes], weights: Weights) -> dict[str, torch.Tensor]:
    infos = weights.base.tensors
    return {
        name: torch.frombuffer(bytearray(one), dtype=infos[name].torch_dtype).view(infos[name].shape).clone()
        for name, one in data.items()
    }


def who(engine: FakeEngine, lora: LoraFolder | None, weights: Weights) -> list[str]:
    """The names whose weights these are, up to rounding; deltas are far larger."""
    found = effective(engine, lora, weights)
    return [name for name, data in weights.expected.items() if _distance(found, tensors(data, weights)) < 1e-5]


def _distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)
