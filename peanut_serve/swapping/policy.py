"""Which variant has the weights next, where one engine serves many: pure decisions, no clock and no engine.

Waiting is rent, a swap is bought. Requests for other variants pay rent, in request-seconds, from the moment the
active one got the weights. When it reaches what a swap costs those whom it stops, the swap pays: neither side then
loses much more than the other. Waiting from before doesn't count: it would pay for one swap after another.

Every condition is a moment computed without the present time. So an answer only changes at one of these moments, and
`next_look` can name it exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from statistics import fmean

# of a measurement in the estimate; a swap's time changes little, but the first after a start is often slow
_WEIGHT = 0.3


@dataclass(frozen=True)
class Policy:
    """What the operator chooses.

    Attributes:
        max_wait: seconds; a request that waited this long is overdue, and its variant next, but for those that are
            overdue longer.
        min_dwell: seconds an activated variant keeps the weights while it has requests and none is overdue. It is for
            what the price leaves out: a drain leaves the engine half empty, even where swaps are cheap.
    """

    max_wait: float = 10.0
    min_dwell: float = 0.5


@dataclass(frozen=True)
class Queue:
    """Requests of one variant that wait.

    Attributes:
        digest: of the variant.
        arrivals: monotonic seconds, oldest first; at least one.
    """

    digest: str
    arrivals: tuple[float, ...]


@dataclass(frozen=True)
class View:
    """What is decided on.

    Attributes:
        now: monotonic seconds.
        active: digest of the variant whose weights the engine has.
        since: monotonic seconds; when it got them.
        running: requests of it in the engine.
        queues: of the variants that are ready to be swapped to; the active one's own only when a swap held it back.
        swap_seconds: what a swap is expected to take once the engine is drained.
    """

    now: float
    active: str
    since: float
    running: int
    queues: tuple[Queue, ...]
    swap_seconds: float


@dataclass(frozen=True)
class PriceEstimate:
    """What a swap is expected to take: a mean of those measured, the later the heavier.

    Attributes:
        seconds: the estimate; a guess until there is a measurement.
        measured: whether there was a measurement.
    """

    seconds: float = 1.0
    measured: bool = False

    def after(self, seconds: float) -> "PriceEstimate":
        """The estimate once a swap took this many seconds."""
        old = self.seconds if self.measured else seconds
        return PriceEstimate(old + _WEIGHT * (seconds - old), measured=True)


@dataclass(frozen=True)
class _Claim:
    """A queue's claim to the weights: moments, in monotonic seconds, that don't depend on the present one."""

    digest: str
    oldest: float
    overdue_at: float
    paid_at: float  # when the swap pays, and may be; never for the active variant, which needs none
    rank: tuple[float, int, float, str]  # the smallest goes first of those that have paid


def next_variant(view: View, policy: Policy) -> str:
    """The digest that should have the weights: the active one (admit its requests), or another (drain and swap).

    It may be asked again while the engine drains, and may then name another one, or the active one again. After a
    swap, admit what waited for it before asking: else the weights could go to and fro with nobody served.
    """
    return _choose(view.now, view.active, list(_claims(view, policy)))


def next_look(view: View, policy: Policy) -> float | None:
    """Monotonic seconds when the answer of `next_variant` changes though nothing arrives or ends; None if never."""
    claims = list(_claims(view, policy))
    answer = _choose(view.now, view.active, claims)
    moments = sorted({moment for claim in claims for moment in (claim.overdue_at, claim.paid_at)})
    later = (moment for moment in moments if view.now < moment < inf)
    return next((moment for moment in later if _choose(moment, view.active, claims) != answer), None)


def _choose(now: float, active: str, claims: list[_Claim]) -> str:
    overdue = [claim for claim in claims if now >= claim.overdue_at]
    if overdue:
        return min(overdue, key=lambda claim: (claim.oldest, claim.digest)).digest
    paid = [claim for claim in claims if now >= claim.paid_at]
    return min(paid, key=lambda claim: claim.rank).digest if paid else active


def _claims(view: View, policy: Policy) -> Iterator[_Claim]:
    own = sum(len(queue.arrivals) for queue in view.queues if queue.digest == view.active)
    stopped = view.running + own  # about as many as would be served meanwhile
    for queue in view.queues:
        count, oldest = len(queue.arrivals), queue.arrivals[0]
        if queue.digest == view.active:
            paid_at = inf
        elif not stopped:
            paid_at = -inf  # nobody is served: waiting longer gains nothing
        else:
            from_start = fmean(max(arrival, view.since) for arrival in queue.arrivals)
            paid_at = max(from_start + view.swap_seconds * stopped / count, view.since + policy.min_dwell)
        # When its requests have waited max_wait in total. It ranks about as the total does, many or old ones first,
        # but for good: the totals themselves overtake each other as time goes by.
        due = fmean(queue.arrivals) + policy.max_wait / count
        yield _Claim(queue.digest, oldest, oldest + policy.max_wait, paid_at, (due, -count, oldest, queue.digest))
