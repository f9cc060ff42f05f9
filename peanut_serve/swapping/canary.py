"""A prompt whose answer is known: does the engine compute with the weights it is thought to have?"""

import math
from dataclasses import dataclass

from converters.errors import PeanutError


class CanaryError(PeanutError):
    """The engine's answer is not what it was with the same weights."""


@dataclass(frozen=True)
class Canary:
    """What a fixed prompt was answered with.

    Attributes:
        tokens: greedy.
        logprobs: of the likeliest tokens at each position, by token.
        tolerance: by how much logprobs of the same weights may differ; 0 where the engine repeats itself exactly.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    tolerance: float = 0.0

    def check(self, other: "Canary") -> None:
        """Raise `CanaryError` unless another answer is the same, and finite."""
        found = [value for position in other.logprobs for value in position.values()]
        if not found or not all(math.isfinite(value) for value in found):
            raise CanaryError("the canary's logprobs are not finite: the weights in the engine are broken")
        if (distance := self.distance(other)) > self.tolerance:
            raise CanaryError(
                f"the canary's logprobs are off by {distance:.2g} (at most {self.tolerance:.2g}): the engine "
                "does not compute with the weights it was given"
            )

    def is_like(self, other: "Canary") -> bool:
        """Whether another answer is the same, as far as the engine repeats itself."""
        return self.distance(other) <= self.tolerance

    def distance(self, other: "Canary") -> float:
        """Largest difference of logprobs; infinite where others are not finite, or other tokens are likely."""
        if len(self.logprobs) != len(other.logprobs):
            return math.inf
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        differences = [abs(value - b.get(token, math.nan)) for a, b in pairs for token, value in a.items()]
        if not differences or not all(map(math.isfinite, differences)):
            return math.inf
        return max(differences)
