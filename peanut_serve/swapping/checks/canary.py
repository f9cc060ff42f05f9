"""A prompt with a known answer, to verify that the engine computes with the expected weights."""

import math
from dataclasses import dataclass

from converters.errors import PeanutError


class CanaryError(PeanutError):
    """The engine's answer differs from an earlier one with the same weights."""


@dataclass(frozen=True)
class Canary:
    """The answer to a fixed prompt.

    Attributes:
        tokens: decoded greedily.
        logprobs: of the most likely tokens at each position, by token.
        tolerance: by how much logprobs of the same weights may differ; 0 if the engine is deterministic.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    tolerance: float = 0.0

    def check(self, other: "Canary") -> None:
        """Raise `CanaryError` unless another answer is finite and equal, within the tolerance."""
        found = [value for position in other.logprobs for value in position.values()]
        if not found or not all(math.isfinite(value) for value in found):
            raise CanaryError("the canary's logprobs are not finite: the weights in the engine are invalid")
        if (distance := self.distance(other)) > self.tolerance:
            raise CanaryError(
                f"the canary's logprobs differ by {distance:.2g}, expected at most {self.tolerance:.2g}: the engine "
                "does not compute with the weights it loaded"
            )

    def is_like(self, other: "Canary") -> bool:
        """Whether another answer is equal, within the tolerance."""
        return self.distance(other) <= self.tolerance

    def distance(self, other: "Canary") -> float:
        """Largest difference of logprobs; infinite if one is not finite, or if the most likely tokens differ."""
        if len(self.logprobs) != len(other.logprobs):
            return math.inf
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        differences = [abs(value - b.get(token, math.nan)) for a, b in pairs for token, value in a.items()]
        if not differences or not all(map(math.isfinite, differences)):
            return math.inf
        return max(differences)
