"""Every method of the table, in each of its forms, with random numbers, for a weight (10, 14)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from converters import Orientation, Tweaker
from converters.methods.base import Method
from converters.methods.dense.shira import ShiRa
from converters.methods.multiplicative.dora import Dora
from converters.methods.multiplicative.embedding_dora import EmbeddingDora
from converters.methods.multiplicative.ia3 import Ia3
from converters.methods.spectral.adamss import Adamss
from converters.methods.spectral.frod import Frod
from converters.methods.table import METHODS

OUT, IN, R = 10, 14, 3


def tweaker(orientation: Orientation, **settings: Any) -> Tweaker:
    shapes = {Orientation.ROWS: ((R, IN), (IN, R)), Orientation.COLUMNS: ((R, OUT), (OUT, R))}
    a, b = shapes.get(orientation, ((R, IN), (OUT, R)))
    return Tweaker(orientation, torch.randn(a), torch.randn(b), **settings)


def hidden(count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(R, R) for _ in range(count))


# every row of the table of methods stands here, in each of its forms
SAMPLES: dict[str, Callable[[], Method]] = {
    "peanut rows": lambda: tweaker(Orientation.ROWS, act_fn="tanh", scaling=0.5),
    "peanut columns": lambda: tweaker(
        Orientation.COLUMNS, encoders=hidden(2), decoders=hidden(2), act_fn="silu", scaling=0.5
    ),
    "peanut free": lambda: tweaker(Orientation.FREE, act_fn="linear", scaling=2.0),
    "peanut output": lambda: tweaker(Orientation.ROWS, output_act_fn="tanh"),
    "dora": lambda: Dora(torch.randn(R, IN), torch.randn(OUT, R), torch.rand(OUT) + 0.5, 0.7),
    "lora-bias": lambda: stored("lora-bias", {"A": (R, IN), "B": (OUT, R), "bias": (OUT,)}, scaling=1.5),
    "kasa": lambda: stored("kasa", {"A": (R, IN), "B": (OUT, R), "diag": (R,)}, scaling=1.5),
    "bd-lora a": lambda: stored("bd-lora", {"A": (4, 7), "B": (OUT, 4)}, scaling=1.5, blocks_A=2, blocks_B=1),
    "bd-lora b": lambda: stored("bd-lora", {"A": (4, IN), "B": (OUT, 2)}, scaling=1.5, blocks_A=1, blocks_B=2),
    "qalora": lambda: stored("qalora", {"A": (R, 2), "B": (OUT, R)}, scaling=1.5, group_size=7),
    "pissa": lambda: stored("pissa", {"A": (R, IN), "B": (OUT, R)}, scaling=1.5),
    "olora": lambda: stored("olora", {"A": (R, IN), "B": (OUT, R)}, scaling=-1.5),
    "ia3 outputs": lambda: Ia3(torch.randn(OUT, 1), "outputs"),
    "ia3 inputs": lambda: Ia3(torch.randn(1, IN), "inputs"),
    "adalora": lambda: stored("adalora", {"A": (R, IN), "B": (OUT, R), "E": (R, 1)}, scaling=1.5),
    "adalora pruned": lambda: stored("adalora", {"A": (0, IN), "B": (OUT, 0), "E": (0, 1)}, scaling=1.5),
    "vera": lambda: stored("vera", {"lambda_b": (OUT,), "lambda_d": (R,), "A": (R, 20), "B": (30, R)}),
    "pvera": lambda: stored("pvera", {"lambda_b": (OUT,), "lambda_d": (2 * R,), "A": (2 * R, 20), "B": (30, R)}),
    "vera from its seed": lambda: stored(
        "vera-seeded", {"lambda_b": (OUT,), "lambda_d": (R,)}, seed=5, largest_out=30, largest_in=20
    ),
    "pvera from its seed": lambda: stored(
        "pvera-seeded", {"lambda_b": (OUT,), "lambda_d": (2 * R,)}, seed=5, largest_out=30, largest_in=20
    ),
    "vblora": lambda: stored("vblora", {"logits_A": (R, 7, 9), "logits_B": (5, R, 9), "bank": (9, 2)}, topk=2),
    "vblora topk": lambda: stored(
        "vblora",
        {
            "indices_A": (R, 7, 2),
            "weights_A": (R, 7, 1),
            "indices_B": (5, R, 2),
            "weights_B": (5, R, 1),
            "bank": (9, 2),
        },
        topk=2,
    ),
    "unilora": lambda: stored(
        "unilora",
        {"indices_A": (R, IN), "indices_B": (OUT, R), "scales_A": (R, IN), "scales_B": (OUT, R), "theta_d": (9,)},
    ),
    "tinylora": lambda: stored("tinylora", {"A": (R, IN), "B": (OUT, R), "P": (5, R, R), "v": (5,)}),
    "miss": lambda: stored("miss", {"block": (R, OUT)}, mini=False),
    "miss mini": lambda: stored("miss", {"block": (R, 5)}, mini=True),
    "miss bat": lambda: stored("miss-bat", {"block": (5, 2, 2)}),
    "gralora": lambda: stored("gralora", {"A": (2, 7, 4), "B": (2, 4, 5)}, scaling=1.5),
    "gralora hybrid": lambda: stored(
        "gralora", {"A": (2, 7, 4), "B": (2, 4, 5), "A_general": (3, IN), "B_general": (OUT, 3)}, scaling=1.5
    ),
    "delora": lambda: stored("delora", {"A": (R, IN), "B": (OUT, R), "lambda": (1,), "w_norm": (IN,)}),
    "loha": lambda: stored(
        "loha", {"w1_a": (OUT, R), "w1_b": (R, IN), "w2_a": (OUT, R), "w2_b": (R, IN)}, scaling=1.5
    ),
    "loha full": lambda: stored(
        "loha", {"w1_a": (OUT, 4), "w1_b": (4, IN), "w2_a": (OUT, 4), "w2_b": (4, IN)}, scaling=1.5
    ),
    "lokr": lambda: stored("lokr", {"w1": (2, 2), "w2_a": (5, 2), "w2_b": (2, 7)}, scaling=1.5),
    "lokr full": lambda: stored("lokr", {"w1_a": (2, 1), "w1_b": (1, 2), "w2": (5, 7)}, scaling=1.5),
    "hira": lambda: stored("hira", {"A": (R, IN), "B": (OUT, R)}),
    "deft": lambda: stored("deft", {"P": (OUT, R), "R": (R, IN)}, decomposition="relu", scaling=1.5),
    "deft qr": lambda: stored("deft", {"P": (OUT, R), "R": (R, IN)}, decomposition="qr", scaling=1.5),
    "deft para": lambda: stored("deft", {"P": (OUT, R)}, decomposition="qr", scaling=1.0),
    "osf": lambda: stored("osf", {"U": (OUT, 2), "S": (2,), "V": (2, IN)}),
    "osf most": lambda: stored("osf", {"U": (OUT, 6), "S": (6,), "V": (6, IN)}),
    "osf nothing": lambda: stored("osf", {"U": (OUT, 0), "S": (0,), "V": (0, IN)}),
    "psoft": lambda: stored(
        "psoft",
        {"R": (R,), "vector_a": (R,)},
        r=R,
        init="psoft_init",
        orthogonal=True,
        neumann_terms=None,
        eps=None,
    ),
    "frod": lambda: Frod(
        {
            "lambda_l": torch.randn(IN),
            "lambda_s": torch.randn(3),
            "V": torch.randn(IN, IN),
            "indices": torch.tensor([[0, 4, 9], [13, 2, 0]]),
            "size": torch.tensor([IN, IN]),
        }
    ),
    "adamss": lambda: adamss(1),
    "adamss many": lambda: adamss(5),
    "hra": lambda: stored("hra", {"u": (IN, R)}, apply_GS=False),
    "hra orthogonal": lambda: stored("hra", {"u": (IN, R)}, apply_GS=True),
    "glora": lambda: stored(
        "glora",
        {
            **{f"{letter}.Xd": (OUT, R) for letter in "AB"},
            **{f"{letter}.Xu": (R, IN) for letter in "AB"},
            "C.Xd": (IN, R),
            "C.Xu": (R, 1),
            "D.X": (1,),
            "E.X": (1,),
        },
        A="lora",
        B="lora",
        C="lora",
        D="constant",
        E="constant",
    ),
    "glora vectors": lambda: stored(
        "glora",
        {"A.X": (OUT, 1), "B.X": (OUT, 1), "C.X": (IN, 1), "D.X": (OUT,), "E.X": (OUT,)},
        A="vector",
        B="vector",
        C="vector",
        D="vector",
        E="vector",
    ),
    "oft": lambda: stored("oft", {"R": (2, 21)}, block_share=False, eps=None, neumann_terms=5),
    "oft shared": lambda: stored("oft", {"R": (1, 21)}, block_share=True, eps=0.5, neumann_terms=None),
    "boft": lambda: stored("boft", {"R": (1, 7, 2, 2), "s": (OUT, 1)}),
    "road": lambda: stored("road", {"theta": (OUT,), "alpha": (OUT,)}, variant="road_2", group_size=OUT),
    "fourierft": lambda: stored("fourierft", {"spectrum": (11,)}, scaling=9.0, seed=3),
    "waveft": lambda: stored("waveft", {"spectrum": (11,)}, scaling=9.0, seed=3, wavelet="db1"),
    "waveft coif1": lambda: stored("waveft", {"spectrum": (11,)}, scaling=9.0, seed=3, wavelet="coif1"),
    "waveft without idwt": lambda: stored("waveft", {"spectrum": (11,)}, scaling=9.0, seed=3, wavelet=None),
    "c3a": lambda: stored("c3a", {"kernel": (5, 7, 2)}),
    "shira": lambda: ShiRa(
        {"weight": torch.randn(3), "indices": torch.tensor([[0, 4, 9], [13, 2, 0]], dtype=torch.int32)}
    ),
    "supertuning": lambda: stored("supertuning", {"values": (4,), "indices": (4,)}, sparsity=0.97, scaling=None),
    "supertuning supra": lambda: stored(
        "supertuning", {"values": (4,), "indices": (4,), "A": (R, IN), "B": (OUT, R)}, sparsity=0.97, scaling=1.5
    ),
    "randlora": lambda: stored(
        "randlora", {"lambda": (R, 4), "gamma": (4, OUT), "A": (R, 1, OUT), "B": (20, 5, R)}, scaling=1.5
    ),
    "beft": lambda: stored("beft", {"b": (1, OUT)}),
    "trainable tokens": lambda: stored("trainable-tokens", {"rows": (3, IN)}, token_indices=[7, 0, 5]),
    "dora embedding": lambda: EmbeddingDora(torch.randn(R, OUT), torch.randn(IN, R), torch.rand(IN) + 0.5, 0.7),
    "red": lambda: stored("red", {"scaling": (1, OUT), "bias": (1, OUT)}),
    "red scaling": lambda: stored("red", {"scaling": (1, OUT)}),
    "lora embedding": lambda: stored("lora-embedding", {"A": (R, OUT), "B": (IN, R)}, scaling=1.5),
    "dora convolution": lambda: stored(
        "dora-convolution", {"A": (R, 2, 7), "B": (OUT, R, 1), "magnitude_vector": (1, OUT, 1)}, scaling=1.5
    ),
    "lora convolution": lambda: stored("lora-convolution", {"A": (R, 2, 7), "B": (OUT, R, 1)}, scaling=1.5),
}


def adamss(rank: int) -> Adamss:
    """With two clusters, which were found."""
    shapes = {"A.0": (rank, 6), "B.0": (4, rank), "A.1": (rank, 6), "B.1": (OUT - 4, rank), "newB": (6, IN)}
    parts = {part: torch.randn(shape) for part, shape in shapes.items()}
    return Adamss({**parts, "places": torch.randperm(OUT)}, {"clusters": 2, "seed": 0})


def stored(name: str, shapes: dict[str, tuple[int, ...]], **settings: Any) -> Method:
    """A method with random numbers, and indices below 9 where it has any."""
    method = METHODS[name]
    parts = {
        part: torch.randint(9, shape) if part in method.integers else torch.randn(shape)
        for part, shape in shapes.items()
    }
    return method.from_parts(parts, settings)
