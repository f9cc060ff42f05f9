"""Clients that are slow, or many, or send large headers: each port gives them up, and answers others."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
import uvicorn.config
from support.classify.serving import classifying
from support.classify.stand_ins import stand_in
from support.server.admin import KEY, FakeControl, serving_app
from support.server.certificates import self_signed
from uvicorn.protocols.http.h11_impl import H11Protocol

from peanut_serve.web import connections
from peanut_serve.web.admin import admin_app
from peanut_serve.web.connections import AdminProtocol, Bounds, bind, bound_connections

PATIENCE = 30.0
BEGUN = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADER_SECONDS", "BODY_SECONDS", "STALL_SECONDS", "CLOSE_SECONDS"):
        monkeypatch.setattr(connections, name, 0.5)


@pytest.fixture
def admin_url() -> Iterator[str]:
    with serving_app(admin_app(FakeControl(), KEY)) as url:
        yield url


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, port = url.rpartition("/")[2].split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        yield client


def rest_of(client: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def seconds_until_closed(url: str, sent: bytes, drip: bytes = b"") -> float:
    """How long a connection stays open on which this was sent, and then a byte now and then."""
    began = time.monotonic()
    with connected(url) as client:
        client.sendall(sent)
        client.settimeout(0.1)
        while time.monotonic() - began < PATIENCE:
            try:
                if not client.recv(65536):
                    break
            except TimeoutError:
                client.sendall(drip)
            except OSError:
                break
    return time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", b"GET /", BEGUN])
def test_headers_that_do_not_arrive_at_the_admin_port(admin_url: str, sent: bytes) -> None:
    assert 0.3 < seconds_until_closed(admin_url, sent, b"a" if sent else b"") < 10
    assert httpx.get(f"{admin_url}/healthz").status_code == 200


def test_the_second_request_of_a_connection(admin_url: str) -> None:
    first = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    assert 0.3 < seconds_until_closed(admin_url, first + BEGUN, b"a") < 10


def test_a_connection_that_is_kept_alive_is_not_closed_early(admin_url: str) -> None:
    with httpx.Client(base_url=admin_url) as client:
        assert client.get("/healthz").status_code == 200
        time.sleep(1)
        before = client.get("/healthz").extensions["network_stream"]
        assert client.get("/healthz").extensions["network_stream"] is before


def test_headers_that_do_not_arrive_at_a_port_with_tls(tmp_path: Path) -> None:
    with serving_app(admin_app(FakeControl(), KEY), self_signed(tmp_path)) as url:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with connected(url) as plain, context.wrap_socket(plain) as client:
            client.sendall(BEGUN)
            assert client.recv(1) == b""


def test_headers_that_do_not_arrive_at_classifiers(tmp_path: Path) -> None:
    with classifying(stand_in(tmp_path / "mood")) as (url, _):
        for sent in (b"", BEGUN):
            assert 0.3 < seconds_until_closed(url, sent, b"a" if sent else b"") < 10
        assert httpx.get(f"{url}/health").status_code == 200


async def no_content(scope: dict, receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body"})  # type: ignore[operator]


@contextmanager
def uvicorn_serving(app: object = no_content, **options: object) -> Iterator[str]:
    """A server as vLLM starts it: with uvicorn's own choice of a protocol."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, **options))  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


class BoundedH11(Bounds, H11Protocol):
    """Where httptools is not installed."""


def test_headers_that_do_not_arrive_at_vllms_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    bound_connections()
    with uvicorn_serving() as url:
        assert 0.3 < seconds_until_closed(url, BEGUN, b"a") < 10
        assert httpx.get(url).status_code == 204


def test_large_headers_are_refused(admin_url: str) -> None:
    with connected(admin_url) as client:
        client.sendall(BEGUN)
        answer = b""
        try:
            for _ in range(100):
                client.sendall(b"a" * 4096)
        except OSError:
            pass
        answer = rest_of(client)
    assert not answer or (b" 431 " in answer and b"the headers are larger than 64 KiB" in answer)
    headers = {"X-Large": "a" * 60_000}
    assert httpx.get(f"{admin_url}/healthz", headers=headers).status_code == 200


def test_large_headers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the client reads the refusal."""
    monkeypatch.setattr(connections, "HEADER_BYTES", 1000)
    with serving_app(admin_app(FakeControl(), KEY)) as url, connected(url) as client:
        client.sendall(BEGUN + b"a" * 2000)
        answer = rest_of(client)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"type": "RequestTooLargeError"' in answer


@pytest.mark.parametrize("size", [30_000, 300_000])
def test_headers_that_arrive_while_another_request_is_answered(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    bound_connections()

    async def app(scope: dict, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})  # type: ignore[operator]
        await asyncio.sleep(1)
        await send({"type": "http.response.body", "body": b"ended"})  # type: ignore[operator]

    with uvicorn_serving(app) as url, connected(url) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while b"begun" not in answer:  # the headers may arrive alone
            part = client.recv(65536)
            assert part
            answer += part
        with suppress(OSError):
            client.sendall(BEGUN)
            for _ in range(size // 10_000):
                client.sendall(b"a" * 10_000)
        answer = rest_of(client)
    assert (b"ended" in answer) is (size == 30_000)


def test_the_rest_of_a_refused_body_is_no_header(admin_url: str) -> None:
    body = b"a" * 200_000
    with connected(admin_url) as client:
        head = f"POST /admin/v1/variants HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode())
        refused = client.recv(65536)
        while not refused.endswith(b"}}"):
            refused += client.recv(65536)
        assert refused.startswith(b"HTTP/1.1 401 ")
        client.sendall(body)
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = rest_of(client)
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_too_many_connections_to_the_admin_port(admin_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", PATIENCE)
    monkeypatch.setattr(AdminProtocol, "most", 4)
    monkeypatch.setattr(connections, "BODY_SECONDS", PATIENCE)
    headers = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(admin_url)) for _ in range(4)]
        assert httpx.get(f"{admin_url}/healthz").status_code == 200
        assert rest_of(idle[0]) == b"", "the oldest one made room"
        for _ in range(4):
            client = stack.enter_context(connected(admin_url))
            client.sendall(f"POST /admin/v1/variants HTTP/1.1\r\n{headers}\r\n{{".encode())
        deadline = time.monotonic() + PATIENCE
        while (refused := httpx.get(f"{admin_url}/healthz")).status_code != 503:
            assert time.monotonic() < deadline
        assert refused.json()["error"]["message"] == "4 requests are being answered; try again later"
    while httpx.get(f"{admin_url}/healthz").status_code != 200:
        assert time.monotonic() < deadline


def test_a_body_that_does_not_arrive_at_the_admin_port(admin_url: str) -> None:
    headers = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    with connected(admin_url) as client:
        client.sendall(f"POST /admin/v1/variants HTTP/1.1\r\n{headers}\r\n{{".encode())
        answer = rest_of(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within" in answer


def is_ended(url: str, ask: bytes) -> bool:
    """Whether a connection ends whose client asks again and again, and reads nothing."""
    began = time.monotonic()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = url.rpartition("/")[2].split(":")
        client.connect((host, int(port)))
        client.settimeout(0.2)
        while time.monotonic() - began < PATIENCE:
            try:
                client.sendall(ask)
            except TimeoutError:
                continue
            except OSError:
                return True
    return False


@pytest.mark.parametrize("is_admin", [True, False])
def test_an_answer_that_nobody_reads(is_admin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The admin port ends the connection; elsewhere the application gives up, and uvicorn closes it in vain."""
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    bound_connections()

    async def app(scope: dict, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        for _ in range(100):
            part = {"type": "http.response.body", "body": b"a" * 65536, "more_body": True}
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(send(part), PATIENCE if is_admin else 0.1)  # type: ignore[operator]
        # it returns without the end of the response

    options = {"http": AdminProtocol} if is_admin else {}
    with uvicorn_serving(app, **options) as url:
        assert is_ended(url, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def test_h11_is_bounded_too() -> None:
    with uvicorn_serving(http=BoundedH11) as url:
        assert 0.3 < seconds_until_closed(url, BEGUN, b"a") < 10
        assert httpx.get(url).status_code == 204
