"""The options of the format `lora`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import OptionError

RUNTIMES = ("vllm",)


@dataclass(frozen=True)
class LoraOptions:
    """What a LoRA adapter may be. Raises `OptionError` for invalid values.

    Attributes:
        rank: the largest rank that a module may have. An update of a larger rank, or without exact factors, is
            approximated. None to write exact factors of any rank, and nothing else.
        max_error: how much of a module's delta an approximation may lose, relative to the delta (Frobenius norm).
        runtime: write it as this runtime loads it, and refuse what that does not load: `vllm`, or None for PEFT. They
            differ in mixtures of experts, see `experts.py`.
    """

    rank: int | None = None
    max_error: float = 0.01
    runtime: str | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank={self.rank} is not a rank; expected at least 1")
        if not 0 <= self.max_error < 1:
            raise OptionError(f"max_error={self.max_error:g} is not a relative error; expected 0.01 for 1 %")
        if self.runtime not in (None, *RUNTIMES):
            raise OptionError(f"runtime={self.runtime!r} is unknown; expected {' or '.join(RUNTIMES)}")

    @classmethod
    def of(cls, own: Mapping[str, Any]) -> "LoraOptions":
        """From the options of a request. Raises `OptionError` for one without effect, too."""
        if "max_error" in own and "rank" not in own:
            raise OptionError("max_error= needs rank=: without a rank, only exact factors are written")
        return cls(**own)
