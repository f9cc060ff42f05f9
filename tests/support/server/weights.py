"""Weights of tiny variants for tests of swaps."""

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from support.server.fake_engine import FakeEngine, read
from support.tiny_models import edit_weights, save_adapter, tiny_llama

from converters import merge
from converters.models.checkpoint import Checkpoint, open_checkpoint
from peanut_serve.swapping.checks.self_test import run_self_test
from peanut_serve.swapping.transaction import Loaded
from peanut_serve.variants.opening import VersionOpener, adapter_version
from peanut_serve.variants.version import base_version


def other_theta(adapter: Path, other: Path, part: str = "layers.0.self_attn.q_proj.peanut_B") -> Path:
    """A copy of an adapter with other θ in one place."""
    shutil.copytree(adapter, other)
    edit_weights(
        other / "adapter_model.safetensors",
        lambda theta: {key: value + 1 if part in key else value for key, value in theta.items()},
    )
    return other


@dataclass(frozen=True)
class Weights:
    """What can be in the engine: by name, as versions and as bytes."""

    base: Checkpoint
    tasks: Path
    versions: dict[str, Loaded]
    expected: dict[str, dict[str, bytes]]


def weights_in(folder: Path, keeps_base: bool = False) -> Weights:
    """Base, v1, and two that are v1 but for one tensor; for workers that keep W0, q_proj as its factors."""
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder / "base")
    base, tasks = open_checkpoint(folder / "base"), folder / "tasks"
    save_adapter(tiny_llama(), tasks / "v1")
    other_theta(tasks / "v1", tasks / "v2")
    other_theta(tasks / "v1", tasks / "v3", "layers.1.self_attn.v_proj.peanut_A")
    model, _ = asyncio.run(run_self_test(FakeEngine(base), base))
    versions, expected = {"base": Loaded(base_version(base))}, {"base": read(base.tensors.values())}
    for name in ("v1", "v2", "v3"):
        version = adapter_version(name, tasks / name, VersionOpener(model, "cpu", keeps_base=keeps_base))
        versions[name] = Loaded(version, version.evaluate())
        merged = merge(folder / "base", tasks / name, folder / f"merged-{name}").output
        expected[name] = read(open_checkpoint(merged).tensors.values())
    return Weights(base, tasks, versions, expected)
