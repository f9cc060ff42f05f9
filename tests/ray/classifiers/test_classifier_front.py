"""What the front of classifiers tells a tenant besides its answer; test_classifier_fleet.py has real replicas."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError
from starlette.requests import Request
from support.server.tenants import entry, token_of, write_keys

from peanut_serve.ray.classifiers.door import FrontDoor
from peanut_serve.ray.classifiers.front import ClassifierFront
from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.web.request_body import Bodies

Ask = Callable[[Request], Awaitable[Any]]

RATES = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59"}


class Broken:
    """A deployment whose replicas do not answer."""

    def broadcast(self, _: str) -> "Broken":
        return self

    async def results_async(self, **_: object) -> object:
        raise RayError("they are gone")


async def asked(
    front: Any, ask: Callable[[Request], Awaitable[Any]], body: bytes = b""
) -> tuple[int, dict[str, str]]:
    """Status and headers of what a tenant gets, as they are sent; its visit has ended then."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    key = f"Bearer {token_of('one')}".encode()
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"authorization", key)]}
    response = await ask(Request(scope, receive))
    await response(scope, receive, send)
    assert front._door._clients._tenants._loads["one"].inside == 0
    json.loads(sent[1]["body"])
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("route", "status"),
    [("models", 200), ("replicas", 403), ("other", 403), ("first", 404), ("task", 400), ("task", 413)],
)
def test_every_answer_tells_the_rate(route: str, status: int, tmp_path: Path) -> None:
    tenant = entry("one", variants=["first", "task"], requests_per_minute=60)
    settings = ClassifierSettings(folders=(tmp_path,), keys=write_keys(tmp_path / "keys.json", tenant))
    task = SimpleNamespace(kind=SimpleNamespace(task="text-classification"), labels=["a"])
    front: Any = SimpleNamespace(
        _door=FrontDoor(settings), _tasks={"task": task}, _most_bytes=10, _bodies=Bodies(10), _replicas=Broken()
    )

    async def pass_on(*_: object) -> tuple[int, dict[str, str], bytes]:
        return 400, {}, b'{"error": "no text"}'

    front._pass_on = pass_on
    front._read = lambda request, take: ClassifierFront._read(front, request, take)
    front._answer = lambda *given: ClassifierFront._answer(front, *given)
    routes: dict[str, Ask] = {
        "models": lambda request: ClassifierFront.models(front, request),
        "replicas": lambda request: ClassifierFront.replicas(front, request),
    }
    ask = routes.get(route, lambda request: ClassifierFront.ask(front, route, request))
    found, headers = asyncio.run(asked(front, ask, b" " * (11 if status == 413 else 1)))
    assert (found, RATES.items() <= headers.items()) == (status, True), headers
    assert headers["x-ratelimit-reset-requests"].endswith("s")
