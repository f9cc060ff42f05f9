"""What is known of requests: of one that may run, and of all for a variant."""

from collections.abc import Callable
from dataclasses import dataclass

from peanut_serve.lora.folders import LoraFolder
from peanut_serve.variants.version import Version


@dataclass(frozen=True, eq=False)
class Admitted:
    """A request that may run.

    Attributes:
        name: of the variant.
        version: the weights that answer it.
        is_running: whether it still may; afterwards, the engine may have other weights.
        lora: the LoRA adapter that it uses on top of the base's weights, if it does.
    """

    name: str
    version: Version
    is_running: Callable[[], bool]
    lora: LoraFolder | None = None


@dataclass
class Usage:
    """Requests for a variant so far."""

    requests: int = 0
    last_used: float | None = None  # seconds since the epoch
