"""The admin API over a real socket."""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from schemathesis.specs.openapi.schemas import OpenApiSchema
from support.server.admin import KEY, REFUSALS, FakeControl, serving_app

from converters.errors import OptionError
from peanut_serve.web import connections
from peanut_serve.web.admin import admin_app
from peanut_serve.web.connections import bind, serve_on
from peanut_serve.web.schema import Control

V1 = "/admin/v1"
KEY_IN_ASCII = "secret"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FastAPI, str]]:
    app = admin_app(FakeControl(), KEY)
    with serving_app(app) as url:
        yield app, url


@pytest.fixture
def control(served: tuple[FastAPI, str]) -> FakeControl:
    served[0].state.control = FakeControl()
    return served[0].state.control


@pytest.fixture
def client(served: tuple[FastAPI, str], control: Control) -> Iterator[httpx.Client]:
    headers = {b"Authorization": b"Bearer " + KEY.encode()}
    with httpx.Client(base_url=served[1], headers=headers) as client:
        yield client


def refusal(response: httpx.Response) -> tuple[int, str]:
    """The status and error type of an error response, whose form is checked."""
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"type", "message"}
    return response.status_code, response.json()["error"]["type"]


def test_every_route(client: httpx.Client, control: FakeControl) -> None:
    variants = client.get(f"{V1}/variants").json()
    assert [variant["name"] for variant in variants] == control.names
    assert client.get(f"{V1}/variants/base").json() == variants[0]
    assert client.get(f"{V1}/engine").json()["swap_seconds"] == {"drain": 0.5, "apply": 0.25}
    done = client.post(f"{V1}/variants", json={"name": "new", "source": "/srv/new"})
    assert (done.status_code, done.json()["state"]) == (201, "ready")
    assert client.get(f"{V1}/swaps").json()[0]["outcome"] == "rolled_back"
    assert client.get(f"{V1}/traffic").json()[0]["p95_seconds"] == 1.25
    for verb in ("activate", "reload", "rollback", "preload", "pin", "unpin"):
        assert client.post(f"{V1}/variants/new/{verb}").json()["name"] == "new"
    assert client.post(f"{V1}/variants/new/rollback", json={"digest": "d0", "hold": True}).status_code == 200
    assert client.delete(f"{V1}/variants/new?drain=true").status_code == 204
    assert client.delete(f"{V1}/variants/base").content == b""
    assert control.calls == [
        ("register", "new", "/srv/new"),
        ("activate", "new"),
        ("reload", "new"),
        ("rollback", "new", None, False),
        ("preload", "new"),
        ("pin", "new", True),
        ("pin", "new", False),
        ("rollback", "new", "d0", True),
        ("unregister", "new", True),
        ("unregister", "base", False),
    ]


@pytest.mark.parametrize(
    "given",
    [None, b"", KEY.encode(), b"Bearer", b"Bearer wrong", b"Basic " + KEY.encode(), b"Bearer \xff\xe9",
     b"Bearer " + KEY.encode("latin-1"), b"Bearer " + KEY.encode() + b"x", b"Bearer x " + KEY.encode()],
)  # fmt: skip
def test_nothing_is_done_without_the_key(client: httpx.Client, control: FakeControl, given: bytes | None) -> None:
    del client.headers["Authorization"]
    headers = {} if given is None else {b"Authorization": given}
    for path in (f"{V1}/variants", f"{V1}/engine", f"{V1}/openapi.json", "/openapi.json", "/docs", "/", "/healthz/"):
        response = client.get(path, headers=headers)
        assert refusal(response) == (401, "AuthenticationError")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert client.post(f"{V1}/variants/base/activate", headers=headers).status_code == 401
    assert client.post(f"{V1}/variants", headers=headers, content=b"{").status_code == 401
    assert client.get("/healthz", headers=headers).json() == {"status": "ok"}
    assert control.calls == []


def test_the_scheme_in_any_case(client: httpx.Client) -> None:
    assert client.get(f"{V1}/engine", headers={b"authorization": b"bearer  " + KEY.encode()}).status_code == 200


@pytest.mark.parametrize("key", ["", " \n", "two\nlines", "a\0b"])
def test_invalid_keys(control: Control, key: str) -> None:
    with pytest.raises(OptionError, match="the admin key in the server's settings (is empty|must be one line)"):
        admin_app(control, key)


@pytest.mark.parametrize("name", REFUSALS)
def test_errors(client: httpx.Client, name: str) -> None:
    error, status = REFUSALS[name]
    response = client.post(f"{V1}/variants/{name}/activate")
    assert refusal(response) == (status, "InternalError" if name == "bug" else type(error).__name__)
    assert name == "bug" or response.json()["error"]["message"] == str(error)
    assert response.headers.get("Retry-After") == {"full": "3", "down": "20"}.get(name)


def test_malformed_requests(client: httpx.Client, control: FakeControl) -> None:
    for content in (
        b"{",
        b"[]",
        b'{"name": "a"}',
        b'{"name": 1, "source": ""}',
        b'{"name": "a", "source": "", "x": 1}',
    ):
        response = client.post(f"{V1}/variants", content=content, headers={"Content-Type": "application/json"})
        assert refusal(response) == (422, "RequestError")
    assert response.json()["error"]["message"] == "body.x: Extra inputs are not permitted"
    assert refusal(client.post(f"{V1}/variants/base/rollback", json={"to": "d0"})) == (422, "RequestError")
    assert refusal(client.delete(f"{V1}/variants/base?drain=perhaps")) == (422, "RequestError")
    assert refusal(client.get(f"{V1}/nothing")) == (404, "RequestError")
    assert refusal(client.put(f"{V1}/variants/base")) == (405, "RequestError")
    assert control.calls == []


@pytest.mark.parametrize(
    ("path", "name"),
    [("user/name", "user/name"), ("user%2Fname", "user/name"), ("user%2fname", "user/name"), ("%2E%2E", ".."),
     ("%2E%2E%2Fengine", "../engine"), ("%2Fetc%2Fpasswd", "/etc/passwd"), ("/etc", "/etc"), ("a/%2E%2E/b", "a/../b"),
     ("a%00b", "a\0b"), ("user%252Fname", "user%2Fname"), ("a/activate", "a/activate"), ("a/pin", "a/pin"),
     ("%C3%A9", "é"), ("", "")],
)  # fmt: skip
def test_names(client: httpx.Client, control: FakeControl, path: str, name: str) -> None:
    """Each name reaches the control unchanged, where it is looked up."""
    expected = 200 if name in control.names else 404
    assert client.get(f"{V1}/variants/{path}").status_code == expected
    for verb in ("activate", "reload", "rollback", "pin", "unpin"):
        assert client.post(f"{V1}/variants/{path}/{verb}").status_code == expected
    client.delete(f"{V1}/variants/{path}")
    assert {call[1] for call in control.calls} == {name}
    assert len(control.calls) == 6


def test_the_openapi_document(client: httpx.Client) -> None:
    document = client.get(f"{V1}/openapi.json").json()
    routes = {
        (method, path): route
        for path, methods in document["paths"].items()
        for method, route in methods.items()
        if path != "/healthz"
    }
    assert len(routes) == 14
    assert len({route["operationId"] for route in routes.values()}) == 14
    assert routes["post", f"{V1}/variants/{{name}}/activate"]["operationId"] == "activate_variant"
    for (_, path), route in routes.items():
        assert route["summary"]
        assert route["security"] == [{"adminKey": []}]
        wanted = {"401", "403", "default", *({"404"} if "{name}" in path else ())}
        assert wanted <= set(route["responses"])
        for status in set(route["responses"]) - {"200", "201", "204"}:
            schema = route["responses"][status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert document["components"]["securitySchemes"]["adminKey"]["scheme"] == "bearer"
    for model in ("VariantStatus", "EngineStatus", "SwapStatus", "VariantTraffic", "Registration", "Rollback"):
        assert all(field["description"] for field in document["components"]["schemas"][model]["properties"].values())
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_a_port_that_is_in_use() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OptionError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(OptionError, match="cannot listen on no.such.host.invalid:0"):
        bind("no.such.host.invalid", 0)


def test_shutdown(control: FakeControl, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps handling signals, and cancels; then the port is free again, without waiting for a hanging swap."""
    monkeypatch.setattr(connections, "GRACE", 0.1)
    control.activate = lambda name: asyncio.sleep(600)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]

    async def serve() -> None:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        task = asyncio.create_task(serve_on(admin_app(control, KEY), listener))
        headers = {b"Authorization": b"Bearer " + KEY.encode()}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
            hanging = asyncio.create_task(client.post(f"{V1}/variants/base/activate"))
            assert (await client.get("/healthz")).status_code == 200
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await hanging).status_code == 500
        bind("127.0.0.1", port).close()

    asyncio.run(asyncio.wait_for(serve(), 10))


@pytest.mark.slow
def test_clients_that_do_nothing_disturb_nobody(control: FakeControl) -> None:
    """Connections without a request, with half a request or half a body; the server answers others, and stops."""
    head = f"POST {V1}/variants HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n"
    idle: list[socket.socket] = []
    with serving_app(admin_app(control, KEY)) as url:
        host, port = url.removeprefix("http://").split(":")
        for sent in ("", "GET ", head, f"{head}\r\n{{"):
            for _ in range(20):
                idle.append(socket.create_connection((host, int(port)), timeout=10))
                idle[-1].sendall(sent.encode())
        headers = {b"Authorization": b"Bearer " + KEY.encode()}
        assert httpx.get(f"{url}{V1}/variants", headers=headers, timeout=10).status_code == 200
        start = time.monotonic()
    assert time.monotonic() - start < 25  # `serving_app` waits for its thread for 30 s
    for one in idle:
        one.close()


def test_a_large_body_is_refused(client: httpx.Client, control: FakeControl) -> None:
    for content in (b"x" * 10_000_000, iter([b"x" * 100_000] * 100)):
        found = client.post(f"{V1}/variants", content=content, headers={"Content-Type": "application/json"})
        assert found.status_code in (400, 413)
        assert refusal(found)[1] == "RequestError"
    assert control.calls == []


@pytest.mark.slow
def test_whatever_the_schema_allows_and_does_not(control: FakeControl) -> None:
    """Requests made from the OpenAPI document, valid and not: every answer is one that it describes."""
    headers = {"Authorization": f"Bearer {KEY_IN_ASCII}"}
    app = admin_app(control, KEY_IN_ASCII)
    schema: OpenApiSchema = schemathesis.openapi.from_asgi(f"{V1}/openapi.json", app, headers=headers)
    for operation in schema.get_all_operations():
        found = operation.ok()

        @settings(max_examples=30)
        @given(
            case=found.as_strategy(generation_mode=GenerationMode.POSITIVE)
            | found.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        )
        def check(case: schemathesis.Case) -> None:
            response = case.call(headers=headers)
            case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

        check()
