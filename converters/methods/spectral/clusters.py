"""Which rows of W0 belong together, for AdaMSS: k-means of the left singular vectors, by HF PEFT's own layer.

The random numbers, the SVD in float32 and the k-means depend on the versions of torch and scikit-learn. What the
layer finds is compared with what was saved by the training, by whoever asks.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import MissingDependencyError

_ONE_AT_A_TIME = threading.Lock()  # the layer seeds the random numbers of the process


@dataclass(frozen=True, eq=False)
class Clusters:
    """What an AdaMSS layer derives from W0.

    Attributes:
        vectors: the right singular vectors of (W0 | bias), (r, in) or (r, in + 1).
        rows: the rows of all clusters, one after the other (out,).
        sizes: how many rows each cluster has.
    """

    vectors: Tensor
    rows: Tensor
    sizes: tuple[int, ...]


def find_clusters(weight: Tensor, bias: Tensor | None, r: int, count: int, seed: int) -> Clusters:
    """The clusters of one module's rows (HF PEFT's `peft/tuners/adamss/layer.py`, `update_layer`).

    Args:
        weight, bias: of the module, (out, in) and (out,).
        r, count, seed: `r`, `num_subspaces` and `random_seed` of the config.

    Raises `MissingDependencyError` without HF PEFT or scikit-learn.
    """
    try:
        from peft import AdamssConfig
        from peft.tuners.adamss.layer import Linear

        config = AdamssConfig(r=r, num_subspaces=count, random_seed=seed)  # which looks for scikit-learn
    except ImportError:
        raise MissingDependencyError(
            "AdaMSS needs HF PEFT and scikit-learn: pip install 'peanut-serve[peft]'"
        ) from None
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = torch.nn.Parameter(weight.detach().float().cpu())
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.detach().float().cpu())
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), torch.no_grad():
        layer = Linear(module, "default", r=r, config=config)
    sizes = tuple(len(part) for part in layer.adamss_B["default"].parameters())
    return Clusters(layer.adamss_newB["default"].detach(), layer.scatter_index["default"], sizes)
