"""The router of a fleet, with replicas that only tell what they have."""

import asyncio
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from peanut_serve.ray.router import VariantRouter

ENGINE = DeploymentID("Engine", "fleet")


class Fleet:
    """A router and its replicas: name -> what the replica tells."""

    def __init__(self, **told: dict[str, Any]) -> None:
        self.router = VariantRouter(ENGINE, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        self.router.initialize_state()
        self.replicas = {
            name: SimpleNamespace(replica_id=ReplicaID(name, ENGINE), routing_stats=stats)
            for name, stats in told.items()
        }
        self.router._replicas = {replica.replica_id: replica for replica in self.replicas.values()}
        self.sent = 0

    def order(self, variant: str) -> list[str]:
        """The replicas, the best first."""
        ranks = asyncio.run(self._ranks(variant))
        assert all(len(rank) == 1 for rank in ranks), "Ray would choose between them"
        return [rank[0].replica_id.unique_id for rank in ranks]

    def send(self, variant: str, replica: str) -> str:
        """A request is taken by a replica. Returns its id."""
        self.sent += 1
        pending = asyncio.run(self._pending(variant))
        self.router.on_request_routed(pending, self.replicas[replica].replica_id, None)
        return pending.metadata.internal_request_id

    def end(self, request: str, replica: str) -> None:
        self.router.on_request_completed(self.replicas[replica].replica_id, request)

    async def _ranks(self, variant: str) -> list[list[Any]]:
        candidates: Any = list(self.replicas.values())
        return await self.router.choose_replicas(candidates, await self._pending(variant))

    async def _pending(self, variant: str) -> PendingRequest:
        return PendingRequest([], {}, RequestMetadata("", str(self.sent), multiplexed_model_id=variant))


def tells(*resident: str, **more: Any) -> dict[str, Any]:
    return {"resident": resident, "slots": 1, **more}


def test_a_request_goes_where_its_variant_is() -> None:
    fleet = Fleet(a=tells("x"), b=tells("y"), c=tells("z"))
    assert [fleet.order(variant)[0] for variant in "xyz"] == ["a", "b", "c"]


def test_what_a_replica_answered_counts_until_it_tells_something_newer() -> None:
    fleet = Fleet(a=tells("x"), b=tells("y"))
    request = fleet.send("z", "b")
    fleet.end(request, "b")
    assert fleet.order("z")[0] == "b"
    fleet.replicas["b"].routing_stats = tells("y")
    fleet.replicas["a"].routing_stats = tells("z")
    assert fleet.order("z")[0] == "a"


def test_a_replica_that_refuses_a_variant_comes_last_for_it_alone() -> None:
    fleet = Fleet(a=tells("x", "y", withheld=["x"]), b=tells("z"))
    assert fleet.order("x") == ["b", "a"]
    assert fleet.order("y") == ["a", "b"]


def test_a_replica_whose_engine_is_down_comes_last() -> None:
    fleet = Fleet(a=tells("x", serves=False), b=tells("y", serves=True))
    assert fleet.order("x") == ["b", "a"]


def test_adapters_on_the_weights_of_the_base_need_no_turns_of_their_own() -> None:
    """Auto mode: v0 to v9 are LoRA on the base, m is merged."""
    together = ["base", *(f"v{number}" for number in range(10))]
    fleet = Fleet(a=tells(*together, together=together), b=tells("m", together=together))
    for number in range(5):
        fleet.send(f"v{number}", "a")
    assert fleet.order("v7")[0] == "a", "they all run beside each other"
    assert fleet.order("m")[0] == "b"


def test_an_adapter_that_was_answered_tells_that_the_base_is_there() -> None:
    together = ["base", "v1", "v2"]
    fleet = Fleet(a=tells("m", together=together), b=tells("n", together=together))
    request = fleet.send("v1", "b")
    fleet.end(request, "b")
    assert fleet.order("v2")[0] == "b"


def test_adapters_that_wait_for_the_base_wait_for_one_turn() -> None:
    together = ["base", "v1", "v2", "v3"]
    several = Fleet(a=tells("m", together=together), b=tells("n", together=together))
    for variant in together[1:]:
        several.send(variant, "a")
    several.send("p", "b")
    several.send("q", "b")
    assert several.order("o")[0] == "a", "one turn comes first there, and two at the other"
