"""Ray Serve's request router for the engines of a fleet: ranks the replicas by what a request costs there.

There is one front, whose router knows what it has sent where; the replicas tell which variants are resident. The
interface is alpha in Ray 2.60: `RequestRouter` of `ray.serve.request_router`.
"""

import time
from collections import Counter
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from peanut_serve.ray.placement import Popularity, Replica, ranked

_BASE = ""  # also what requests without a variant are for


class VariantRouter(RequestRouter):
    """One per front."""

    def initialize_state(self, **_: Any) -> None:
        """Called by Ray in place of `__init__`."""
        self._popularity = Popularity()
        self._sent: dict[ReplicaID, dict[str, str]] = {}  # replica -> request -> variant
        # replica -> what it told when it answered a request for a variant, and the variant: newer than what it told
        self._answered: dict[ReplicaID, tuple[dict[str, Any], str]] = {}
        self._unreachable: set[ReplicaID] = set()
        self._together = frozenset[str]()  # the variants that the base's weights answer, where weights are swapped

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, each in a rank of its own: within a rank, Ray would take the one with the shortest queue."""
        for replica in candidate_replicas:
            # else Ray asks every ten seconds how long a queue is, and passes over a replica that is slow to tell
            if replica.replica_id not in self._unreachable:
                sent = self._sent.get(replica.replica_id, {})
                self.replica_queue_len_cache.update(replica.replica_id, len(sent))
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        told = {replica.replica_id.unique_id: replica.routing_stats for replica in candidate_replicas}
        self._together = frozenset().union(*(one.get("together", ()) for one in told.values()))
        seen = [self._seen(replica) for replica in candidate_replicas]
        variant = pending_request.metadata.multiplexed_model_id
        order = ranked(self._weights(variant), seen, self._popularity)
        # last those that refuse it, or whose engine is not up
        order.sort(key=lambda name: variant in told[name].get("withheld", ()) or not told[name].get("serves", True))
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray when a replica has taken a request."""
        self._unreachable.discard(replica_id)
        variant = pending_request.metadata.multiplexed_model_id
        self._popularity.count(self._weights(variant), time.monotonic())
        self._sent.setdefault(replica_id, {})[pending_request.metadata.internal_request_id] = variant

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray when a request has ended, however it did."""
        variant = self._sent.get(replica_id, {}).pop(internal_request_id, None)
        replica = self.curr_replicas.get(replica_id)
        if variant and replica is not None:
            self._answered[replica_id] = (replica.routing_stats, variant)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Called by Ray when a replica could not be reached: it has to answer Ray before it gets another request."""
        super().on_replica_actor_unavailable(replica_id)
        self._unreachable.add(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray when the fleet has changed."""
        super().update_replicas(replicas)
        living = {replica.replica_id for replica in replicas}
        self._sent = {replica: sent for replica, sent in self._sent.items() if replica in living}
        self._answered = {replica: answered for replica, answered in self._answered.items() if replica in living}
        self._unreachable &= living

    def _weights(self, variant: str) -> str:
        """What a turn is for: variants that share the base's weights need only one."""
        return _BASE if variant in self._together else variant

    def _seen(self, replica: RunningReplica) -> Replica:
        told = replica.routing_stats
        resident = frozenset(map(self._weights, told.get("resident", ())))
        told_then, last = self._answered.get(replica.replica_id, (None, ""))
        answered = self._weights(last)
        if told_then == told and answered not in resident:  # it has not told anything since
            resident = frozenset([answered]) if told.get("slots", 1) == 1 else resident | {answered}
        sent = Counter(map(self._weights, self._sent.get(replica.replica_id, {}).values()))
        running = sum(count for variant, count in sent.items() if variant in resident)
        waiting = {variant: count for variant, count in sent.items() if variant not in resident}
        return Replica(replica.replica_id.unique_id, resident, told.get("slots", 1), waiting, running)
