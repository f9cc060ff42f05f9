"""Calls that go to all replicas, each with a bound of its own: one that hangs hides no answer of the others."""

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

Entry = dict[str, Any]


async def ask_all(engines: DeploymentHandle[Any], method: str, *arguments: Any, within: float) -> list[Entry]:
    """What all running replicas return, sorted by their names; see `lost` for one that returns nothing.

    Args:
        engines: the deployment.
        method: of `EngineReplica`; it returns a mapping with the name as `replica`.
        arguments: its arguments.
        within: seconds that a replica has.

    Raises `DeploymentUnavailableError` without a replica, `TimeoutError` if Serve does not say which there are.
    """
    async with asyncio.timeout(within):
        # `results_async` would give up all answers if one is late
        results = await engines.broadcast(method, *arguments)._fetch_replica_results_async()

    async def answer(result: Any) -> Entry:
        """What one replica returns."""
        try:
            async with asyncio.timeout(within):
                found: Entry = await result.get_async()
                return found
        except Exception as error:  # of Ray, or of the replica's method
            return lost(error)

    entries = await asyncio.gather(*map(answer, results))
    return sorted(entries, key=lambda entry: str(entry["replica"]))


def lost(error: BaseException) -> Entry:
    """The entry of a replica that did not answer. Ray does not say which it was."""
    return {"replica": None, "status": 503, "error": f"the replica did not answer ({type(error).__name__})"}
