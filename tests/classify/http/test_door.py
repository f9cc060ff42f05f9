"""What every request passes: clients that do not read, that go away, and too many bodies at once."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from peanut_serve.classify.http.door import FACTS, Door, refusal
from peanut_serve.errors import QueueFullError, UnauthorizedError
from peanut_serve.web.request_body import ClientLimits

LIMITS = ClientLimits(body_bytes=100, body_seconds=0.2, stall_seconds=0.2)


class Server:
    """Counts requests."""

    def __init__(self) -> None:
        self.is_ready = True
        self.counted: list[tuple[str | None, str]] = []
        self.metrics = SimpleNamespace(
            observe_request=lambda name, outcome, seconds: self.counted.append((name, outcome))
        )


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body."""
    scope[FACTS].update(asked="mood", name="mood", digest="d")
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


async def knock(door: Door, *messages: Any, send: Any = None) -> list[Any]:
    """A request with these messages, and what was sent."""
    left, sent = list(messages), []

    async def receive() -> Any:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    async def keep(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/models/mood", "headers": []}
    await asyncio.wait_for(door(scope, receive, send or keep), 10)
    return sent


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_body_in_parts_arrives_whole_and_the_version_is_in_the_headers(server: Server) -> None:
    sent = asyncio.run(knock(Door(echo, server, (), LIMITS), part(b"good ", True), part(b"film")))
    assert sent[1]["body"] == b"good film"
    assert (b"x-peanut-variant", b"mood") in sent[0]["headers"]
    assert (b"x-peanut-digest", b"d") in sent[0]["headers"]
    assert server.counted == [("mood", "200")]


def test_a_server_that_stops_closes_the_connection_after_the_answer(server: Server) -> None:
    server.is_ready = False
    sent = asyncio.run(knock(Door(echo, server, (), LIMITS), part(b"film")))
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_client_that_does_not_read_is_given_up(server: Server) -> None:
    async def never(_: Any) -> None:
        await asyncio.Event().wait()

    asyncio.run(knock(Door(echo, server, (), LIMITS), part(b"film"), send=never))
    assert server.counted == [("mood", "499")]


def test_a_client_that_goes_away_before_its_body_has_come_is_forgotten(server: Server) -> None:
    assert asyncio.run(knock(Door(echo, server, (), LIMITS), part(b"a", True), {"type": "http.disconnect"})) == []


def test_the_bodies_of_all_requests_are_bounded(server: Server) -> None:
    door = Door(echo, server, (), LIMITS)

    async def test() -> None:
        waiting = [asyncio.create_task(knock(door, part(b"x" * 100, True))) for _ in range(16)]
        await asyncio.sleep(0.05)
        (start, body) = await knock(door, part(b"x"))
        assert start["status"] == 429
        assert b"take all the memory that they may" in body["body"]
        late = await asyncio.gather(*waiting)
        assert [one[0]["status"] for one in late] == [408] * 16
        assert (await knock(door, part(b"x")))[0]["status"] == 200, "the bytes of the others are still counted"

    asyncio.run(test())


def test_refusals_say_when_to_come_again_and_what_to_send() -> None:
    status, body, headers = refusal(QueueFullError("9 inputs are waiting", 3))
    assert (status, headers["retry-after"]) == (429, "3")
    assert body == b'{"error": "9 inputs are waiting", "type": "QueueFullError"}'
    assert refusal(UnauthorizedError("no key"))[2]["www-authenticate"] == "Bearer"
