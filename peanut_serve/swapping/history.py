"""The latest changes of the engine's weights: what operators look at after a failure, and what a swap will cost."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from peanut_serve.signals.tracing import Past, record
from peanut_serve.swapping.policy import Reason, View
from peanut_serve.swapping.transaction import Phase, Report

_MOST_RECORDS = 256
_MOST_CHARACTERS = 2000  # of an error
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0  # seconds before a failed swap is retried

# done; or the weights of before, as nothing was loaded or everything was restored; or the base's, after a restart; or
# no engine, as it could not be restarted
Outcome = Literal["done", "cancelled", "rolled_back", "restarted", "down"]
Cause = Literal[Reason, "operator", "engine_died"]


@dataclass(frozen=True)
class SwapRecord:
    """One attempt to change the weights of the engine, as it ended.

    Attributes:
        number: counts the attempts since the start of the server.
        at: when it began, in seconds since the epoch.
        cause: why it began.
        before, before_digest: the variant whose weights the engine had.
        target, digest: the variant that was to get the engine.
        running: requests that had to end before.
        waiting: variant -> requests of clients that waited when it began.
        longest_wait: of the oldest one that waited, in seconds.
        outcome: what came of it; see `Outcome`.
        error: why it failed; None if it did not.
        seconds: duration of each phase, those of a failure included.
        tensors, nbytes: what was loaded.
    """

    number: int
    at: float
    cause: Cause
    before: str
    before_digest: str
    target: str
    digest: str
    running: int
    waiting: Mapping[str, int]
    longest_wait: float
    outcome: Outcome = "done"
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class _Failure:
    error: Exception
    count: int  # in a row
    retry_at: float  # monotonic seconds


class Failures:
    """Versions whose last swap failed, and when the next attempt may be made."""

    def __init__(self) -> None:
        self._last: dict[str, _Failure] = {}

    def add(self, digest: str, error: Exception) -> None:
        """A swap to a version has failed. The pause doubles with each failure in a row."""
        count = self._last[digest].count + 1 if digest in self._last else 1
        pause = min(_LAST_RETRY, _FIRST_RETRY * 2 ** (count - 1))
        self._last[digest] = _Failure(error, count, time.monotonic() + pause)

    def of(self, digest: str | None) -> str | None:
        """Why the last swap to a version failed; None if it did not."""
        return str(self._last[digest].error) if digest in self._last else None

    def left(self, digest: str) -> float:
        """Seconds until the next attempt may be made; not positive if it may be made now."""
        return self._last[digest].retry_at - time.monotonic() if digest in self._last else 0.0

    def forget(self, digest: str) -> None:
        """Allow the next attempt."""
        self._last.pop(digest, None)


@dataclass
class SwapUsage:
    """Number of swaps to a variant, and the duration of the last one, without the drain."""

    swaps: int = 0
    last_seconds: float | None = None


class SwapHistory:
    """A ring of records, for one event loop.

    Args:
        label: the name of a digest.
    """

    def __init__(self, label: Callable[[str], str]) -> None:
        self._label = label
        self._records: deque[SwapRecord] = deque(maxlen=_MOST_RECORDS)
        self._count = 0

    def begin(self, digest: str, cause: Cause, view: View, asking: Sequence[str] = ()) -> SwapRecord:
        """What is known when an attempt begins; `end` keeps it.

        Args:
            digest: of the weights that the engine is to get.
            cause: why.
            view: what the decision was made from.
            asking: digests that operators wait for, each as one of the requests in `view`.
        """
        self._count += 1
        oldest = min((queue.arrivals[0] for queue in view.queues), default=view.now)
        counts = Counter({queue.digest: len(queue.arrivals) for queue in view.queues}) - Counter(asking)
        waiting = {self._label(queued): count for queued, count in counts.items()}
        before, target = self._label(view.active), self._label(digest)
        return SwapRecord(
            self._count, time.time(), cause, before, view.active, target, digest, view.running, waiting,
            max(0.0, view.now - oldest),
        )  # fmt: skip

    def end(self, begun: SwapRecord, report: Report, error: Exception | None = None, is_down: bool = False) -> None:
        """Keep an attempt as it ended, and make its span; the oldest one makes room."""
        ended = replace(
            begun,
            outcome="down" if is_down else outcome_of(report, error),
            error=None if error is None else str(error)[:_MOST_CHARACTERS],
            seconds={phase.value: seconds for phase, seconds in report.seconds.items()},
            tensors=report.tensors,
            nbytes=report.nbytes,
        )
        self._records.append(ended)
        record(_past(ended, report))

    def latest(self) -> list[SwapRecord]:
        """The newest first."""
        return list(reversed(self._records))


def _past(swap: SwapRecord, report: Report) -> Past:
    """An attempt, with its phases as parts."""
    facts: dict[str, str | int | float] = {
        "cause": swap.cause, "outcome": swap.outcome, "from": swap.before, "from_digest": swap.before_digest,
        "to": swap.target, "to_digest": swap.digest, "running": swap.running, "waiting": sum(swap.waiting.values()),
        "longest_wait": swap.longest_wait, "tensors": swap.tensors, "bytes": swap.nbytes,
    }  # fmt: skip
    phases = [Past(f"peanut.swap.{phase.value}", began, ended) for phase, began, ended in report.times]
    attributes = {f"peanut.swap.{name}": value for name, value in facts.items()}
    return Past("peanut.swap", swap.at, time.time(), attributes, swap.error, phases)


def outcome_of(report: Report, error: Exception | None) -> Outcome:
    """What came of an attempt whose engine is up; `cancelled` if nothing was loaded, as when it did not drain."""
    if Phase.RESTART in report.seconds:
        return "restarted"
    if error is None:
        return "done"
    return "rolled_back" if Phase.ROLL_BACK in report.seconds else "cancelled"
