"""A worker that tells what it computes with, bit by bit, and that fails when it is told to.

The tests give it to vLLM in place of `VariantWorker`.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from peanut_serve.variants.on_device.places import decode_places, encode_places
from peanut_serve.vllm_plugin.swap.worker import VariantWorker

# a file that holds the name of a fault; it is taken away, so that each happens once
FAULT = "PEANUT_TEST_FAULT"


class ProbingWorker(VariantWorker):
    """Adds a call to those of the worker, and faults."""

    def peanut_apply(self, places: str, afresh: bool = False) -> float:
        """Load tensors; or fail in the middle, load a part and say nothing, or end the process in between.

        Faults happen to tensors that are loaded, not to layers that are exchanged.
        """
        file = Path(os.environ.get(FAULT, "/nonexistent"))
        if not file.exists():
            return super().peanut_apply(places, afresh)
        fault = file.read_text()
        file.unlink()
        infos = decode_places(places)
        half = len(infos) // 2
        if fault == "raise":
            base = getattr(infos[half], "base", infos[half])
            missing = replace(base, file=Path("/nonexistent"))
            return super().peanut_apply(encode_places([*infos[:half], missing, *infos[half:]]), afresh=True)
        if fault == "silent":
            return super().peanut_apply(encode_places(infos[:half]), afresh=True)
        os._exit(1)

    def probe_weights(self) -> str:
        """SHA-256 of every parameter and buffer, see `weights_of`."""
        digest = hashlib.sha256()
        for name, tensor in weights_of(self.model_runner.get_model()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def weights_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer of a model in vLLM.

    vLLM's CPU backend keeps most weights packed where nothing can read them. So a linear layer is asked for its
    product with the identity, which is the weight, exactly: a sum of one number and of zeros.
    """
    for name, module in sorted(model.named_modules()):
        for kind, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield f"{name}.{kind}", tensor.detach()
        if hasattr(module, "cpu_linear") and module.weight.numel() == 0:
            inputs = getattr(module, "input_size_per_partition", module.input_size)
            identity = torch.eye(inputs, dtype=module.params_dtype)
            yield f"{name}: what it multiplies with", module.cpu_linear(identity, module.weight, None)
