"""PSOFT: `W = W0 + B (R − I) A`, where B A is the best approximation of W0 of rank r, and R turns its parts.

R is the Cayley transform of a skew-symmetric Q, `(I + Q)(I − Q)⁻¹`, or the first terms of its Neumann series, or any
matrix; vectors scale its rows and columns. With U, S, V the r largest singular parts of W0, A is V and B is U·diag(S)
(`psoft_init`), or both have the root of S (`pissa_init`); alpha cancels out.

The signs of singular vectors are arbitrary, R depends on them, and HF PEFT does not save them: it decomposes W0 again
where it loads the adapter. On a CPU, torch with MKL gives the same signs each time; a GPU, or torch with another
LAPACK, gives others (half of them, for a weight that is not square). So the config has to say that it was MKL.
Source: https://openreview.net/forum?id=FSHrinMArK; HF PEFT's `peft/tuners/psoft/layer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converters.errors import AdapterConfigError, BaseMismatchError, ConversionError, ThetaError
from converters.methods.multiplicative.rotations import cayley, neumann
from converters.methods.peft_form import PeftForm, Shapes, boolean, integer, number
from converters.methods.shapes import Axes
from converters.methods.spectral.decomposed import Decomposed, left_axes, singular_parts

_ELSEWHERE = "merge the adapter with PEFT where it was trained"
_ALIGNED = 0.999  # of unit vectors: the cosine below which float32 and float64 mean different ones


def _settings(config: Mapping[str, Any], module: str, shapes: Shapes) -> dict[str, Any]:
    _check_svd(config)
    if config["ab_svd_init"] not in ("psoft_init", "pissa_init"):
        raise AdapterConfigError(f"ab_svd_init = {config['ab_svd_init']!r}; known are psoft_init and pissa_init")
    if number(config, "psoft_alpha") <= 0:
        raise AdapterConfigError(f"psoft_alpha = {config['psoft_alpha']!r}; expected a number above 0")
    for side in ("a", "b"):
        if boolean(config, f"psoft_mag_{side}") != (f"vector_{side}" in shapes):
            raise ThetaError(f"{module}: psoft_mag_{side} is {config[f'psoft_mag_{side}']}, θ says otherwise")
    is_series = boolean(config, "psoft_orth") and boolean(config, "use_cayley_neumann")
    eps = config["cayley_neumann_eps"]
    return {
        "r": integer(config, "r", low=1),
        "init": config["ab_svd_init"],
        "orthogonal": config["psoft_orth"],
        "neumann_terms": integer(config, "num_cayley_neumann_terms", low=1) if is_series else None,
        "eps": number(config, "cayley_neumann_eps") if is_series and eps is not None else None,
    }


def _check_svd(config: Mapping[str, Any]) -> None:
    """Raise `AdapterConfigError` unless this machine gives the singular vectors that the training had."""
    if config["psoft_svd"] != "full":
        raise AdapterConfigError(
            f"psoft_svd = {config['psoft_svd']!r}: what it draws depends on the version of torch; {_ELSEWHERE}"
        )
    if config.get("svd_backend") != "mkl":
        raise AdapterConfigError(
            "PSOFT does not save the signs of the singular vectors, and a GPU or another LAPACK gives others; if the "
            "adapter was trained on a CPU, and torch.backends.mkl.is_available() there, add "
            f'"svd_backend": "mkl" to the file; if not, {_ELSEWHERE}'
        )
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        raise AdapterConfigError(f"svd_backend is mkl, and torch has no MKL on this machine; {_ELSEWHERE}")


@dataclass(frozen=True, eq=False)
class Psoft(Decomposed):
    """θ of one module: the numbers of Q (r (r − 1) / 2,) or of R (r, r); scales of its rows and columns, (r,)."""

    name = "psoft"
    formula = "`W = W0 + B·(R − I)·A`, B·A ≈ W0 of rank r ([PSOFT](https://openreview.net/forum?id=FSHrinMArK))"
    lora_rank = "r"
    remark = (
        'Signs of singular vectors are not saved: needs `"svd_backend": "mkl"` in `adapter_config.json`, which says '
        "that it was trained on a CPU, by torch with MKL"
    )
    axes: ClassVar[Mapping[str, Axes]] = {"vector_a": ("r",), "vector_b": ("r",)}
    peft = PeftForm(
        peft_type="PSOFT",
        parameters={"psoft_R.weight": "R", "psoft_R.vector_a": "vector_a", "psoft_R.vector_b": "vector_b"},
        optional=frozenset({"vector_a", "vector_b"}),
        mark="psoft_",
        fields=(
            "r", "psoft_alpha", "ab_svd_init", "psoft_svd", "psoft_orth", "psoft_mag_a", "psoft_mag_b",
            "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps",
        ),
        inert=("psoft_dropout", "psoft_svd_lowrank_niter", "random_seed", "svd_backend"),
        settings=_settings,
    )  # fmt: skip

    def check(self, sizes: Mapping[str, int]) -> None:
        """See `StoredMethod.check`."""
        r, shape = self.given["r"], tuple(self.theta["R"].shape)
        wanted = (r * (r - 1) // 2,) if self.given["orthogonal"] else (r, r)
        if shape != wanted or sizes.get("r", r) != r:
            raise ThetaError(
                f"θ has shape {shape}, and {sizes.get('r', r)} scales; expected {wanted} and {r}, by the config"
            )

    @property
    def rank(self) -> int:
        """See `WeightDelta.rank`."""
        return int(self.given["r"])

    def check_fits(self, shape: tuple[int, ...], name: str = "w0") -> None:
        """See `WeightDelta.check_fits`."""
        super().check_fits(shape, name)
        if min(shape) < self.rank:
            raise BaseMismatchError(
                f"{name}: the weight has shape {shape}, smaller than r = {self.rank}; another base"
            )

    def change(self) -> Tensor:
        """`R − I` (r, r)."""
        numbers, r = self.theta["R"], self.rank
        identity = torch.eye(r, dtype=numbers.dtype, device=numbers.device)
        if self.given["orthogonal"]:
            rows, columns = torch.triu_indices(r, r, 1, device=numbers.device)
            q = numbers.new_zeros(r, r)
            q[rows, columns] = numbers
            found = self._turned(q - q.T)
        else:
            found = numbers - identity
        rotation = found + identity
        for part, scales in (("vector_b", (-1, 1)), ("vector_a", (1, -1))):
            if part in self.theta:
                rotation = rotation * self.theta[part].reshape(scales)
        return rotation - identity

    def _turned(self, q: Tensor) -> Tensor:
        """`R − I` before it is scaled, from Q."""
        terms, eps = self.given["neumann_terms"], self.given["eps"]
        if terms is None:
            return cayley(-q)
        length = torch.linalg.matrix_norm(q)
        return neumann(q if eps is None else torch.where(length > eps, q * (eps / length), q), terms)

    def up_and_down(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decomposed.up_and_down`."""
        u, values, v = _signed_parts(w0, self.rank)
        if self.given["init"] == "psoft_init":
            return (u * values) @ self.change(), v
        return (u * values.sqrt()) @ self.change(), values.sqrt()[:, None] * v


def _signed_parts(w0: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular parts of W0, with the signs that LAPACK gives in float32, as HF PEFT computes them.

    Raises `ConversionError` where float32 cannot tell them apart.
    """
    is_wide = w0.shape[0] <= w0.shape[1]
    axes, values = (part.to(w0) for part in left_axes(w0 if is_wide else w0.T))
    axes, values = axes[:, :r], values[:r]
    others = ((w0.T if is_wide else w0) @ axes) / values
    u, v = (axes, others.T) if is_wide else (others, axes.T)
    near_u, _, near_v = (part.to(w0) for part in singular_parts(w0.float().cpu()))
    cosines = torch.stack([(u * near_u[:, :r]).sum(0), (v * near_v[:r]).sum(1)])
    if not bool((cosines.abs() >= _ALIGNED).all()):  # also where a value is 0, and nothing a number
        raise ConversionError(
            f"some of the {r} largest singular values of W0 are equal in float32, so its singular vectors, which "
            f"PSOFT turns, are not determined; {_ELSEWHERE}"
        )
    return u * cosines[0].sign(), values, v * cosines[0].sign()[:, None]
