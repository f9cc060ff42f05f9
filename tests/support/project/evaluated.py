"""What every method computes from given numbers, to be compared with what it computed in earlier versions.

`PYTHONPATH=tests python -m support.project.evaluated` records it anew, for a new `EVALUATION`.
"""

import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.method_samples import IN, OUT, SAMPLES
from support.paths import DATA
from torch import Tensor

from converters.methods.spectral import residual
from peanut_serve.variants.version import EVALUATION

FILE = DATA / "evaluation.safetensors"


def evaluated() -> dict[str, Tensor]:
    """Name of a sample -> its delta of a weight, in float64. All numbers come from seeds."""
    least, residual.LEAST_COSINE = residual.LEAST_COSINE, -1.0  # random numbers did not begin with parts of W0
    try:
        found = {}
        for name, make in SAMPLES.items():
            torch.manual_seed(0)
            method, w0 = make().to("cpu", torch.float64), torch.randn(OUT, IN, dtype=torch.float64)
            found[name] = method.delta(w0).contiguous()
        return found
    finally:
        residual.LEAST_COSINE = least


def recorded() -> tuple[str, dict[str, Tensor]]:
    """`EVALUATION` at the time of the record, and what was computed."""
    with safe_open(FILE, "pt") as file:
        return file.metadata()["evaluation"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def changed() -> list[str]:
    """The samples that are evaluated to other numbers than those of the record, beyond the order of summation."""
    _, before = recorded()
    return [
        name
        for name, found in evaluated().items()
        if name in before and not torch.allclose(found, before[name], rtol=1e-9, atol=1e-12)
    ]


if __name__ == "__main__":
    if FILE.exists() and recorded()[0] == EVALUATION and (names := changed()):
        sys.exit(f"{', '.join(names)} changed: raise EVALUATION in peanut_serve/variants/version.py first")
    save_file(evaluated(), FILE, {"evaluation": EVALUATION})
