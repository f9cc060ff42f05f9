"""When requests that need a LoRA adapter beside the resident's weights are admitted: in groups.

A step that has one such request costs about as much as one that has many. If they are admitted one by one, almost
every step has one of them. So they wait for each other, but only while requests of the resident are served, and at
most for so long as an operator allows. If a step has room left, they wait only for a small part of that: an empty
place in all steps costs more than a step with LoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_WITH_ROOM = 1 / 16  # of the time, while a step has room left; found by simulation (tests/support/adaptive/steps.py)


@dataclass(frozen=True)
class Gathering:
    """The operator's setting, and the size of the engine.

    Attributes:
        seconds: how long a request may wait for others, from its arrival; 0 to admit each at once.
        seats: most requests in a step.
    """

    seconds: float = 0.0
    seats: int = 256

    def bound(self, running: float) -> float:
        """Seconds that a request may wait for others while so many are in the engine."""
        return self.seconds if running >= self.seats else self.seconds * _WITH_ROOM

    def due(self, arrivals: Sequence[float], residents: int, running: int) -> float:
        """Monotonic seconds when those that wait are admitted, all together; -inf for at once.

        Args:
            arrivals: of those that wait, in monotonic seconds; at least one.
            residents: requests of the resident that run, or are admitted now.
            running: all that run, or are admitted now.
        """
        if not self.seconds or not residents:
            return float("-inf")
        return min(arrivals) + self.bound(running)
