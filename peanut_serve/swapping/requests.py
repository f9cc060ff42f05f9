"""What is known of requests: of one that may run, and of all for a variant."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from peanut_serve.lora.folders import LoraFolder
from peanut_serve.variants.version import VariantKind, Version

# how an answer is computed: by merged weights; by the base's weights, with LoRA or without
AnswerPath = Literal["merged", "lora", "base"]

_MOST_DURATIONS = 512  # of a variant, the latest ones


@dataclass(frozen=True, eq=False)
class Admitted:
    """A request that may run.

    Attributes:
        name: of the variant.
        version: the weights that answer it.
        is_running: whether it still may; afterwards, the engine may have other weights.
        lora: the LoRA adapter that it uses on top of the base's weights, if it does.
        asked: the name in the request, if it is another one; see `Catalogue.answering`.
    """

    name: str
    version: Version
    is_running: Callable[[], bool]
    lora: LoraFolder | None = None
    asked: str | None = None

    @property
    def model(self) -> str:
        """`model` in the request."""
        return self.asked or self.name

    @property
    def path(self) -> AnswerPath:
        """How the answer is computed."""
        if self.lora is not None:
            return "lora"
        return "base" if self.version.kind is VariantKind.BASE else "merged"


@dataclass
class Usage:
    """Requests for a variant so far.

    Attributes:
        requests: those that were admitted.
        last_used: seconds since the epoch.
        outcomes: of those that ended: a status, or what happened instead.
        seconds: of the latest that were answered, from their arrival to the end of the answer.
    """

    requests: int = 0
    last_used: float | None = None
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_DURATIONS))

    def end(self, outcome: str, seconds: float) -> None:
        """Count a request that ended."""
        self.outcomes[outcome] += 1
        if outcome.startswith("2"):
            self.seconds.append(seconds)

    @property
    def answered(self) -> int:
        """Requests that ended with a success."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("2"))

    def quantile(self, part: float) -> float | None:
        """Seconds that this part of the latest answers did not exceed; None before the first."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None
