"""How well a LoRA adapter of limited rank approximates the adapters it was made from."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from converters.errors import ConversionError
from converters.outputs.lora.options import LoraOptions


@dataclass(frozen=True)
class ModuleError:
    """What a module lost.

    Attributes:
        module: its name.
        norm: Frobenius norm of its delta.
        lost: Frobenius norm of what the factors lack, before they are rounded; 0 where they are exact.
        rank_for: the smallest rank that the options would allow.
        found: relative error of the factors in the file, where they were compared whole.
    """

    module: str
    norm: float
    lost: float = 0.0
    rank_for: int = 1
    found: float = 0.0

    @property
    def error(self) -> float:
        """What is lost, relative to the delta."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Approximation:
    """Relative errors of deltas in the Frobenius norm; 0 where factors are exact.

    Attributes:
        rank: the largest rank that was allowed.
        max_error: the largest error of a module that was allowed.
        error: over all modules.
        modules: by module.
        exact: number of modules whose factors are exact.
        found: the largest error of a module in the file, where rounding adds to it.
    """

    rank: int
    max_error: float
    error: float
    modules: Mapping[str, float] = field(default_factory=dict)
    exact: int = 0
    found: float = 0.0

    @classmethod
    def of(cls, errors: Iterable[ModuleError], options: LoraOptions) -> "Approximation | None":
        """Of all modules; None if only exact factors were asked for.

        Raises `ConversionError` if a module lost more than the options allow.
        """
        if options.rank is None:
            return None
        errors = list(errors)
        _refuse_large(errors, options)
        norm = math.hypot(*(one.norm for one in errors))
        lost = math.hypot(*(one.lost for one in errors))
        return cls(
            rank=options.rank,
            max_error=options.max_error,
            error=lost / norm if norm else 0.0,
            modules={one.module: one.error for one in errors},
            exact=sum(one.lost == 0 for one in errors),
            found=max(one.found for one in errors),
        )

    def facts(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"rank": self.rank, "max_error": self.max_error, "error": self.error, "modules": dict(self.modules)}

    def lines(self) -> list[str]:
        """As a command prints it: over all, then the modules that were approximated, the worst first."""
        others = {module: error for module, error in self.modules.items() if error}
        if not others:
            return [
                f"  approximated: none of {len(self.modules)} modules, all are exact at rank {self.rank}: error 0"
            ]
        whole = (
            f"  approximated: {len(others)} of {len(self.modules)} modules at rank {self.rank}, the other "
            f"{self.exact} are exact; relative error {percent(self.error)} over all, in the file at most "
            f"{percent(self.found)} of a module"
        )
        worst = sorted(others.items(), key=lambda one: -one[1])
        return [whole, *(f"    {module}: {percent(error)}" for module, error in worst)]


def percent(error: float) -> str:
    """A relative error, for people."""
    return f"{100 * error:.3g} %"


def _refuse_large(errors: list[ModuleError], options: LoraOptions) -> None:
    large = [one for one in errors if one.error > options.max_error]
    if not large:
        return
    worst = max(large, key=lambda one: one.error)
    others = f", and more than is allowed of {len(large) - 1} others" if len(large) > 1 else ""
    raise ConversionError(
        f"a LoRA adapter of rank {options.rank} loses {percent(worst.error)} of the delta of {worst.module}{others}; "
        f"max_error={options.max_error:g} allows {percent(options.max_error)}; "
        f"rank={max(one.rank_for for one in errors)} suffices for every module; or merge it"
    )
