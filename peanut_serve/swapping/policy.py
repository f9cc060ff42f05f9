"""Which variant gets the weights next, when one engine serves many: pure decisions, without a clock or an engine.

This is a ski-rental problem: waiting is renting, a swap is buying. The rent is the time, in request-seconds, that the
requests for another variant have waited since the active one got the weights. When it reaches the cost of a swap to
the requests that the swap stops, the swap pays off: neither side then loses much more than the other. Time waited
before the active variant got the weights does not count: otherwise it would pay for one swap after another.

Every condition is a moment that does not depend on the present time. So an answer changes only at one of these
moments, and `next_look` can compute it exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Literal

# a request had waited for `max_wait`; no request was running; waiting had cost as much as the swap
Reason = Literal["overdue", "idle", "paid"]

# weight of a measurement in the estimate; swaps take about the same time, but the first after a start is often slow
_WEIGHT = 0.3


@dataclass(frozen=True)
class Policy:
    """The operator's settings of the policy.

    Attributes:
        max_wait: seconds after which a waiting request is overdue. The variant of the oldest overdue request is next.
        min_dwell: minimum number of seconds a variant stays active while it has requests and no request is overdue.
            It covers a cost that the estimate omits: a drain leaves the engine half empty, even if swaps are cheap.
    """

    max_wait: float = 10.0
    min_dwell: float = 0.5


@dataclass(frozen=True)
class Queue:
    """The waiting requests of one variant.

    Attributes:
        digest: of the variant.
        arrivals: monotonic seconds, oldest first; at least one.
    """

    digest: str
    arrivals: tuple[float, ...]


@dataclass(frozen=True)
class View:
    """The input of a decision.

    Attributes:
        now: monotonic seconds.
        active: digest of the variant whose weights the engine has.
        since: monotonic seconds when it got them.
        running: its requests in the engine.
        queues: of the variants that are ready to be swapped to; the active one has a queue only after a swap that
            held its requests.
        swap_seconds: expected duration of a swap once the engine is drained.
    """

    now: float
    active: str
    since: float
    running: int
    queues: tuple[Queue, ...]
    swap_seconds: float


@dataclass(frozen=True)
class PriceEstimate:
    """Expected duration of a swap: a mean of the measured ones, weighted towards the latest.

    Attributes:
        seconds: the estimate; a guess until there is a measurement.
        measured: whether there was a measurement.
    """

    seconds: float = 1.0
    measured: bool = False

    def after(self, seconds: float) -> "PriceEstimate":
        """The estimate after a swap that took this many seconds."""
        old = self.seconds if self.measured else seconds
        return PriceEstimate(old + _WEIGHT * (seconds - old), measured=True)


@dataclass(frozen=True)
class _Claim:
    """A queue's claim to the weights: moments, in monotonic seconds, that do not depend on the present time."""

    digest: str
    oldest: float
    overdue_at: float
    paid_at: float  # when the swap pays off and is allowed; inf for the active variant, which needs none
    rank: tuple[float, int, float, str]  # of the claims that have paid, the smallest is first


def next_variant(view: View, policy: Policy) -> str:
    """The digest that should get the weights: the active one (admit its requests), or another (drain and swap).

    A call while the engine drains may return another digest, or the active one again. After a swap, admit the
    requests that waited for it before the next call: otherwise the weights could alternate without serving anybody.
    """
    return _choose(view.now, view.active, list(_claims(view, policy)))


def reason_for(digest: str, view: View, policy: Policy) -> Reason:
    """Why `next_variant` chose this digest, which is not the active one."""
    claim = next(claim for claim in _claims(view, policy) if claim.digest == digest)
    if view.now >= claim.overdue_at:
        return "overdue"
    return "idle" if claim.paid_at == -inf else "paid"


def next_look(view: View, policy: Policy) -> float | None:
    """Monotonic seconds when the result of `next_variant` changes if no request arrives or ends; None if never."""
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
    stopped = view.running + own  # about as many requests as would be served meanwhile
    for queue in view.queues:
        count, oldest = len(queue.arrivals), queue.arrivals[0]
        if queue.digest == view.active:
            paid_at = inf
        elif not stopped:
            paid_at = -inf  # no request is served: waiting longer has no benefit
        else:
            from_start = fmean(max(arrival, view.since) for arrival in queue.arrivals)
            paid_at = max(from_start + view.swap_seconds * stopped / count, view.since + policy.min_dwell)
        # When its requests have waited max_wait in total. The order is about that of the total waiting times (many or
        # old requests first), but it is fixed: the order of the totals themselves changes over time.
        due = fmean(queue.arrivals) + policy.max_wait / count
        yield _Claim(queue.digest, oldest, oldest + policy.max_wait, paid_at, (due, -count, oldest, queue.digest))
