"""Which rows of W0 belong together, for AdaMSS: k-means of the left singular vectors, as HF PEFT does it.

The random numbers, the SVD in float32 and the k-means depend on the versions of torch and scikit-learn, and on the
number of threads, by rounding. What is found is compared with what was saved by the training, by whoever asks.
Source: HF PEFT's `peft/tuners/adamss/utils.py`, whose import, and the layer around it, take longer than the rest.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import MissingDependencyError
from converters.methods.spectral.remembering import remembering

_ONE_AT_A_TIME = threading.Lock()  # the random numbers are those of the process
_THREADS = torch.get_num_threads()  # of a program that does not set them, as most trainings

THREAD_COUNTS = tuple(dict.fromkeys([_THREADS, 1, 2, 4, 8, 16]))
"""How many threads a training may have had: the most likely number first."""

# what PEFT calls scikit-learn's KMeans with
_K_MEANS = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}


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
    """The clusters of one module's rows.

    Args:
        weight, bias: of the module, (out, in) and (out,).
        search: what else they depend on.

    Raises `MissingDependencyError` without scikit-learn.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise MissingDependencyError("AdaMSS needs scikit-learn: pip install 'peanut-serve[peft]'") from None
    parts = [weight] if bias is None else [weight, bias[:, None]]
    whole = torch.cat([part.detach().cpu().float() for part in parts], dim=1)
    with _ONE_AT_A_TIME, _threads(search.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(search.seed)
        left, _, right = torch.svd_lowrank(whole, q=min(search.r, *whole.shape), niter=2)
        k_means = KMeans(n_clusters=min(search.count, len(whole)), **_K_MEANS)
        labels = torch.from_numpy(k_means.fit_predict(left.contiguous().numpy()))
    rows = [torch.where(labels == cluster)[0] for cluster in range(int(labels.max()) + 1)]
    return Clusters(right.T.contiguous(), torch.cat(rows), tuple(map(len, rows)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """With this number of threads, whatever the calling thread has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
