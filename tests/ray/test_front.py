"""How a stream ends at the front whose replica is lost, and when one is; test_fleet.py has real ones."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayError
from starlette.requests import Request

from peanut_serve.errors import EngineDownError, EngineLostError, RequestTimeoutError
from peanut_serve.ray import front
from peanut_serve.ray.front import Front, _events, _read
from peanut_serve.ray.replica import EngineReplica
from peanut_serve.tenants.visits import Visit
from peanut_serve.web.clients import Clients
from peanut_serve.web.request_body import Bodies

Ready = Callable[[httpx.Request], httpx.Response]


async def lost_after(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    raise RayError("the replica died")


async def all_of(parts: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in parts])


@pytest.mark.parametrize(
    "parts", [[], [b"data: 1\n\n"], [b"data: 1\n\ndata: {"], [b"data: 1\n"], [b"data: 1\n", b"\n"]]
)
def test_the_event_of_a_lost_replica_is_one_of_its_own(parts: list[bytes]) -> None:
    *_, last, end = asyncio.run(all_of(_events(lost_after(*parts)))).decode().split("\n\n")
    assert end == ""
    error = json.loads(last.strip().removeprefix("data: "))["error"]
    assert "send the request again" in error["message"]


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_BODY_SECONDS", 0.1)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(60)
        return {"type": "http.request", "body": b""}

    with pytest.raises(RequestTimeoutError, match="did not arrive"):
        asyncio.run(asyncio.wait_for(_read(Request({"type": "http"}, receive), lambda size: None), 10))


@pytest.mark.parametrize(
    ("query", "status"), [(b"a=\xff", 400), (b"\xc3", 400), (b"a=%FF", 404), ("a=é".encode(), 404)]
)
def test_a_query_that_is_not_text_is_an_error_of_the_client(query: bytes, status: int) -> None:
    scope = {"type": "http", "method": "GET", "path": "/none", "query_string": query, "headers": []}
    scope |= {"server": ("127.0.0.1", 80), "scheme": "http"}
    front_without_keys = SimpleNamespace(
        _admin=None, _clients=Clients([]), _bodies=Bodies(1), _releases=SimpleNamespace(start=lambda: None)
    )
    front_without_keys._answer = lambda request: Front._answer(front_without_keys, request)
    front_without_keys._answer_of = lambda *given: Front._answer_of(front_without_keys, *given)
    sent: list[Any] = []

    async def ask() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        await (await Front.answer(front_without_keys, Request(scope)))(scope, None, send)

    asyncio.run(ask())
    assert sent[0]["status"] == status
    assert json.loads(sent[1]["body"])["error"]["code"] == status


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_front_is_alive_without_a_replica(method: str) -> None:
    scope = {"type": "http", "method": method, "path": "/health", "query_string": b"", "headers": []}
    scope |= {"server": ("127.0.0.1", 80), "scheme": "http"}
    alone = SimpleNamespace(_admin=None, _releases=SimpleNamespace(start=lambda: None))
    assert asyncio.run(Front.answer(alone, Request(scope))).status_code == 200


class Refusing:
    """A deployment whose replicas all fail with an error of their own; `asked` counts them."""

    def __init__(self, cause: Exception) -> None:
        self._cause, self.asked = cause, 0

    def options(self, **_: object) -> "Refusing":
        return self

    def remote(self, *_: object) -> "Refusing":
        self.asked += 1
        return self

    async def _fetch_future_result_async(self) -> None: ...

    async def __aiter__(self) -> AsyncIterator[bytes]:
        error = RayError("a task failed")
        error.cause = self._cause
        raise error
        yield b""


@pytest.mark.parametrize(("error", "asked"), [(EngineLostError("it died"), 2), (EngineDownError("not here"), 3)])
def test_a_request_that_ends_its_engine_does_not_end_all(
    error: Exception, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_PAUSE", 0.0)
    engines = Refusing(error)
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(Front._try(SimpleNamespace(_engines=engines), "v1", "v1", ("POST", "/", [], b""), Visit()))
    assert engines.asked == asked


def failing(error: type[httpx.TransportError], *later: int) -> Ready:
    """The first look at the engine fails so; the next ones get these answers, and fail so again after them."""
    statuses = iter(later)

    def ready(request: httpx.Request) -> httpx.Response:
        if ready.asked and (status := next(statuses, None)) is not None:  # type: ignore[attr-defined]
            return httpx.Response(status)
        ready.asked = True  # type: ignore[attr-defined]
        raise error("it failed", request=request)

    ready.asked = False  # type: ignore[attr-defined]
    return ready


def broken() -> httpx.Response:
    return httpx.Response(500, headers={"content-length": "2"}, stream=httpx.ByteStream(b"no"))


def answering(status: int) -> Ready:
    return lambda request: httpx.Response(status)


async def asked(ready: Ready, exit_status: int | None, serves: bool) -> tuple[int, bool]:
    """What a request gets that fails with 500 at an engine, and whether the replica says that its engine serves."""

    def engine(request: httpx.Request) -> httpx.Response:
        return ready(request) if request.url.path == "/ready" else broken()

    async with httpx.AsyncClient(transport=httpx.MockTransport(engine), base_url="http://engine") as client:
        replica: Any = SimpleNamespace(
            _client=client, _child=SimpleNamespace(exit_status=exit_status), _serves=serves, _key=b"Bearer key",
            _note=lambda asked, variant: None,
        )  # fmt: skip
        replica._has_died = lambda: EngineReplica._has_died(replica)
        request = ("POST", "/v1/completions", [], b"{}")
        answer: Any = await anext(EngineReplica.handle(replica, "v1", "v1", request))
        return answer[0], replica._serves


@pytest.mark.parametrize(
    ("ready", "exit_status", "serves"),
    [
        (answering(200), None, True),
        (answering(200), None, False),  # it is back
        (failing(httpx.ReadTimeout), None, True),  # it is slow
        (failing(httpx.ReadError, 200), None, True),  # the connection was old
        (failing(httpx.ReadError), None, True),
    ],
)
def test_an_error_of_an_engine_that_works_is_the_answer(ready: Ready, exit_status: int | None, serves: bool) -> None:
    assert asyncio.run(asked(ready, exit_status, serves)) == (500, serves)


@pytest.mark.parametrize(
    ("ready", "exit_status", "serves"),
    [
        (answering(503), None, True),
        (failing(httpx.ConnectError), None, True),
        (failing(httpx.ReadError, 503), None, True),
        (failing(httpx.ReadTimeout), 1, True),
        (failing(httpx.ReadTimeout), None, False),  # the admin API said so
    ],
)
def test_an_error_of_an_engine_that_died_is_tried_elsewhere(
    ready: Ready, exit_status: int | None, serves: bool
) -> None:
    with pytest.raises(EngineLostError):
        asyncio.run(asked(ready, exit_status, serves))
