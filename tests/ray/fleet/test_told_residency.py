"""What a replica tells the router of its engine's weights: whose requests need no swap there."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from peanut_serve.ray.replica import EngineReplica

KINDS = {"base": "base", "v1": "lora", "v2": "lora", "whole": "checkpoint"}


def told(digest: str) -> list[str]:
    """What is resident at a replica whose engine has these weights."""
    variants = [{"name": name, "kind": kind, "digest": name} for name, kind in KINDS.items()]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=variants))

    async def look() -> list[str]:
        replica: Any = SimpleNamespace(_admin=httpx.AsyncClient(base_url="http://engine", transport=transport))
        await EngineReplica._look_at_variants(replica, digest)
        return list(replica._resident)

    return asyncio.run(look())


@pytest.mark.parametrize(("digest", "expected"), [("base", ["base", "v1", "v2"]), ("whole", ["whole"])])
def test_those_who_share_the_weights_need_no_swap(digest: str, expected: list[str]) -> None:
    assert told(digest) == expected
