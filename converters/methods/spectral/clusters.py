"""Which rows of W0 belong together, for AdaMSS: k-means of the left singular vectors, by HF PEFT's own layer.

The random numbers, the SVD in float32 and the k-means depend on the versions of torch and scikit-learn, and on the
number of threads, by rounding. What the layer finds is compared with what was saved by the training, by whoever asks.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import MissingDependencyError
from converters.methods.spectral.remembering import remembering

_ONE_AT_A_TIME = threading.Lock()  # the layer seeds the random numbers of the process
_THREADS = torch.get_num_threads()  # of a program that does not set them, as most trainings

THREAD_COUNTS = tuple(dict.fromkeys([_THREADS, 1, 2, 4, 8, 16]))
"""How many threads a training may have had: the most likely number first."""


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


@dataclass(frozen=True)
class Search:
    """`r`, `num_subspaces` and `random_seed` of the config, and a number of threads."""

    r: int
    count: int
    seed: int
    threads: int = _THREADS


@remembering
def find_clusters(weight: Tensor, bias: Tensor | None, search: Search) -> Clusters:
    """The clusters of one module's rows (HF PEFT's `peft/tuners/adamss/layer.py`, `update_layer`).

    Args:
        weight, bias: of the module, (out, in) and (out,).
        search: what else they depend on.

    Raises `MissingDependencyError` without HF PEFT or scikit-learn.
    """
    try:
        from peft import AdamssConfig
        from peft.tuners.adamss.layer import Linear

        # which looks for scikit-learn
        config = AdamssConfig(r=search.r, num_subspaces=search.count, random_seed=search.seed)
    except ImportError:
        raise MissingDependencyError(
            "AdaMSS needs HF PEFT and scikit-learn: pip install 'peanut-serve[peft]'"
        ) from None
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = torch.nn.Parameter(weight.detach().float().cpu())
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.detach().float().cpu())
    with _ONE_AT_A_TIME, _threads(search.threads), torch.random.fork_rng(devices=[]), torch.no_grad():
        layer = Linear(module, "default", r=search.r, config=config)
    sizes = tuple(len(part) for part in layer.adamss_B["default"].parameters())
    return Clusters(layer.adamss_newB["default"].detach(), layer.scatter_index["default"], sizes)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """With this number of threads, whatever the calling thread has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
