"""What a replica tells the router of its engine's weights: whose requests need no swap there."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from peanut_serve.ray.replica import EngineReplica

KINDS = {"base": "base", "v1": "lora", "v2": "lora", "whole": "checkpoint"}
MERGED = "v1, merged"  # weights that no variant has as its digest


def told(digest: str, resident: str | None) -> list[str]:
    """What is resident at a replica whose engine has these weights."""
    answers: dict[str, Any] = {
        "/engine": {"state": "serving", "digest": digest, "resident": resident},
        "/variants": [{"name": name, "kind": kind, "digest": name} for name, kind in KINDS.items()],
    }

    async def look() -> list[str]:
        admin = httpx.AsyncClient(
            base_url="http://engine",
            transport=httpx.MockTransport(lambda request: httpx.Response(200, json=answers[request.url.path])),
        )
        replica: Any = SimpleNamespace(_admin=admin)
        await EngineReplica._look_at_variants(replica, (await admin.get("/engine")).json())
        return list(replica._resident)

    return asyncio.run(look())


@pytest.mark.parametrize(
    ("digest", "resident", "expected"),
    [
        ("base", None, ["base", "v1", "v2"]),
        (MERGED, "v1", ["base", "v1", "v2"]),
        ("whole", None, ["whole"]),
    ],
)
def test_those_who_share_the_weights_need_no_swap(digest: str, resident: str | None, expected: list[str]) -> None:
    assert told(digest, resident) == expected
