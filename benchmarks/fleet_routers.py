"""What our routing is compared with."""

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class PowerOfTwo(PowerOfTwoChoicesRequestRouter):
    """Ray Serve's default. Of the names of variants it only gets that no replica has told it any."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """As for a request without a name, instead of waiting for a replica that tells it."""
        return await super().choose_replicas(candidate_replicas, None)
