"""A worker that tells what it computes with, bit by bit, and that fails when it is told to.

The tests give it to vLLM in place of `VariantWorker`.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch

from peanut_serve.vllm_plugin.swap.worker import VariantWorker, decode_places, encode_places

# a file that holds the name of a fault; it is taken away, so that each happens once
FAULT = "PEANUT_TEST_FAULT"


class ProbingWorker(VariantWorker):
    """Adds a call to those of the worker, and faults."""

    def peanut_apply(self, places: str) -> float:
        """Load tensors; or fail in the middle, load a part and say nothing, or end the process in between."""
        file = Path(os.environ.get(FAULT, "/nonexistent"))
        if not file.exists():
            return super().peanut_apply(places)
        fault = file.read_text()
        file.unlink()
        infos = decode_places(places)
        half = len(infos) // 2
        if fault == "raise":
            missing = replace(infos[half], file=Path("/nonexistent"))
            return super().peanut_apply(encode_places([*infos[:half], missing, *infos[half:]]))
        if fault == "silent":
            return super().peanut_apply(encode_places(infos[:half]))
        os._exit(1)

    def probe_weights(self) -> str:
        """SHA-256 of every parameter and buffer.

        vLLM's CPU backend keeps most weights packed where nothing can read them. So a linear layer is asked for its
        product with the identity, which is the weight, exactly: a sum of one number and of zeros.
        """
        digest = hashlib.sha256()
        for name, module in sorted(self.model_runner.get_model().named_modules()):
            for kind, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                _add(digest, f"{name}.{kind}", tensor.detach())
            if hasattr(module, "cpu_linear") and module.weight.numel() == 0:
                inputs = getattr(module, "input_size_per_partition", module.input_size)
                identity = torch.eye(inputs, dtype=module.params_dtype)
                _add(digest, f"{name}: what it multiplies with", module.cpu_linear(identity, module.weight, None))
        return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
