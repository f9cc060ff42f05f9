"""Nothing that another web page makes a browser send to the console's port gets anything, or does anything."""

import asyncio
import base64
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.server.admin import KEY, FakeControl
from support.server.console import Completions, logged_in, serving_console

from peanut_serve.web.audit import AuditedControl, AuditLog
from peanut_serve.web.console import sessions
from peanut_serve.web.console.app import ConsoleHost, console_app
from peanut_serve.web.console.sessions import Attempts, Sessions
from peanut_serve.web.console.shell import console_link
from peanut_serve.web.operators import Operators

OPERATOR = Operators([KEY]).find(KEY.encode())
ACT = {"verb": "pin", "name": "base"}
PAGES = ("/console", "/console/live", "/console/dialog?verb=pin&name=base", "/console/comparison?name=base")
TRIAL = {"prompt": "p", "variants": ["base"]}
CHANGES = (("/console/act", ACT), ("/console/playground", TRIAL), ("/console/logout", {}))


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def completions() -> Completions:
    return Completions()


@pytest.fixture
def url(control: FakeControl, completions: Completions) -> Iterator[str]:
    with serving_console(control, completions.route, hosts=("gpu7.example",)) as url:
        yield url


@pytest.fixture
def browser(url: str) -> Iterator[httpx.Client]:
    with logged_in(url) as client:
        yield client


def test_without_a_session(url: str, control: FakeControl, completions: Completions) -> None:
    with httpx.Client(base_url=url, headers={"Origin": url}) as client:
        answer = client.get("/console")
        assert (answer.status_code, answer.headers["location"]) == (303, "/console/login")
        for path in PAGES[1:]:
            assert client.get(path).status_code == 401
        for path, body in CHANGES:
            assert client.post(path, json=body).status_code == 401
            assert client.post(path, json=body, headers={"Cookie": "peanut_console_8001=made-up"}).status_code == 401
            bearer = {"Authorization": f"Bearer {KEY}".encode()}
            assert client.post(path, json=body, headers=bearer).status_code == 401  # pages never have the key
        assert client.get("/console/static/../app.py").status_code in (401, 404)
        assert client.get("/console/static/%2e%2e/app.py").status_code == 404
    assert (control.calls, completions.asked) == ([], [])


def test_the_session_opens_nothing_but_the_console(browser: httpx.Client) -> None:
    assert browser.get("/admin/v1/variants").status_code == 401
    assert browser.get("/consolefoo").status_code == 401
    assert browser.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1"},  # another port of this host
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "file://"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_changes_from_elsewhere(
    browser: httpx.Client, control: FakeControl, completions: Completions, headers: dict[str, str]
) -> None:
    for path, body in CHANGES:
        answer = browser.post(path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (
            403, "the request does not come from the console's own page"
        )  # fmt: skip
    assert browser.post("/console/login", data={"key": KEY}, headers=headers).status_code == 403
    assert (control.calls, completions.asked) == ([], [])
    assert browser.post("/console/act", json=ACT).status_code == 200


def test_changes_need_an_origin_and_the_token(browser: httpx.Client, control: FakeControl) -> None:
    origin, token = browser.headers.pop("Origin"), browser.headers.pop("X-Console-Token")
    assert browser.post("/console/act", json=ACT, headers={"X-Console-Token": token}).status_code == 403
    for wrong in ({}, {"X-Console-Token": token[:-1]}, {"X-Console-Token": b"\xff"}):
        answer = browser.post("/console/act", json=ACT, headers={"Origin": origin, **wrong})
        assert "token of the session" in answer.json()["error"]
    assert control.calls == []


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", "localhost.evil.example", "x@127.0.0.1", "",
     "127.0.0.1:x", "gpu7.example.evil", "[::1", "127.0.0.1/", "gpu7"],
)  # fmt: skip
def test_a_name_that_is_not_ours(browser: httpx.Client, host: str, control: FakeControl) -> None:
    """A page that lets its own name lead to 127.0.0.1 sends that name as Host, and has it as origin."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    for path in (*PAGES, "/console/login", "/console/static/console.js"):
        assert browser.get(path, headers=headers).status_code in (400, 403)
    for path, body in CHANGES:
        assert browser.post(path, json=body, headers=headers).status_code in (400, 403)
    assert control.calls == []


@pytest.mark.parametrize("host", ["localhost:9000", "LOCALHOST", "[::1]:8001", "10.1.2.3:8001", "gpu7.example:8001"])
def test_names_that_are_ours(browser: httpx.Client, host: str) -> None:
    """Those of a tunnel from another port, of an address, and of --console-host."""
    answer = browser.get("/console/login", headers={"Host": host})
    assert answer.status_code in (200, 303)
    answer = browser.post("/console/login", data={"key": KEY}, headers={"Host": host, "Origin": f"http://{host}"})
    assert answer.status_code == 303


def test_websockets_are_refused(url: str, browser: httpx.Client) -> None:
    host, port = url.removeprefix("http://").split(":")
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    for given in ("", f"Cookie: {cookie}\r\n"):
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET /console/live HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nOrigin: https://evil.example\r\n{given}\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(request.encode())
            assert b" 101 " not in connection.recv(200).split(b"\r\n")[0]


def test_a_websocket_of_another_server_is_closed(control: FakeControl) -> None:
    """Even if the HTTP server speaks websockets, as vLLM's does."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    app = console_app(ConsoleHost(control, KEY, 8001))
    asyncio.run(app({"type": "websocket", "path": "/console/live", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_headers(browser: httpx.Client) -> None:
    for path in ("/console", "/console/live", "/console/nothing", "/console/login", "/console/static/console.js"):
        headers = browser.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_the_cookie(url: str) -> None:
    with httpx.Client(base_url=url, headers={"Origin": url}) as client:
        cookie = client.post("/console/login", data={"key": KEY}).headers["set-cookie"].lower()
        assert cookie.startswith("peanut_console_8001=")
        assert {"httponly", "samesite=strict", "path=/console"} <= set(cookie.split("; "))
        assert "secure" not in cookie
        https = {"X-Forwarded-Proto": "https", "Origin": url.replace("http", "https")}  # from a proxy on this host
        answer = client.post("/console/login", data={"key": KEY}, headers=https)
        assert "secure" in answer.headers["set-cookie"].lower()
        plain = {"X-Forwarded-Proto": "https"}
        assert client.post("/console/login", data={"key": KEY}, headers=plain).status_code == 403


def test_the_key_is_taken_from_a_form_only(url: str) -> None:
    with httpx.Client(base_url=url, headers={"Origin": url}) as client:
        assert client.get("/console/login", params={"key": KEY}).status_code == 200
        assert client.post(f"/console/login?key={KEY}").status_code == 403
        assert not client.cookies


def test_wrong_keys_are_limited(url: str) -> None:
    with httpx.Client(base_url=url, headers={"Origin": url}) as client:
        for key in ("", "wrong", KEY + "x", KEY[:-1], "\0"):
            answer = client.post("/console/login", data={"key": key})
            assert answer.status_code == 403
            assert "not an admin key" in answer.text
            assert key not in ("", "\0") or "set-cookie" not in answer.headers
        limited = client.post("/console/login", data={"key": KEY})  # the right one
        assert limited.status_code == 429
        assert 0 < int(limited.headers["retry-after"]) <= 60
        assert not client.cookies


def test_logging_out(browser: httpx.Client, control: FakeControl) -> None:
    cookies = dict(browser.cookies)
    assert browser.post("/console/logout", json={}).status_code == 200
    browser.cookies.update(cookies)  # a copy of the cookie is of no use
    assert browser.get("/console/live").status_code == 401
    assert browser.post("/console/act", json=ACT).status_code == 401
    assert control.calls == []


def test_large_and_malformed_bodies(browser: httpx.Client, control: FakeControl) -> None:
    assert browser.post("/console/act", content=b" " * (200 << 10)).status_code == 413
    assert browser.post("/console/login", content=b"key=" + b"x" * (200 << 10)).status_code == 413
    for content in (
        b"", b"{", b"[]", b'{"verb": "explode", "name": "base"}', b'{"verb": "pin"}',
        b'{"verb": "pin", "name": "base", "x": 1}', b'{"verb": "pin", "name": "%s"}' % (b"n" * 600),
    ):  # fmt: skip
        assert browser.post("/console/act", content=content).status_code == 422
    assert browser.get("/console/dialog?verb=explode").status_code == 422
    assert browser.get("/console/dialog?verb=pin&name=none").status_code == 404
    assert control.calls == []


def test_sessions_end() -> None:
    now = [0.0]
    opened = Sessions(Operators([KEY]), lambda: now[0])
    secret = opened.open(OPERATOR)
    session = opened.find(secret)
    assert session is not None
    assert opened.find(secret + "x") is opened.find(None) is None
    for _ in range(23):
        now[0] += 29 * 60  # in use
        assert opened.find(secret) is session
    now[0] += 31 * 60
    assert opened.find(secret) is None
    secret = opened.open(OPERATOR)
    for _ in range(26):
        now[0] += 29 * 60
        opened.find(secret)
    assert opened.find(secret) is None  # after half a day, used or not


def test_an_open_page_does_not_keep_its_session(monkeypatch: pytest.MonkeyPatch, control: FakeControl) -> None:
    """What its script asks for by itself is no use of it; what a person does is."""
    monkeypatch.setattr(sessions, "_IDLE_SECONDS", 3.0)
    with serving_console(control) as url, logged_in(url) as client:
        start = time.monotonic()
        client.get("/console/comparison")
        while client.get("/console/live").status_code == 200:
            assert time.monotonic() - start < 30
            time.sleep(0.1)
        assert time.monotonic() - start >= 3.0


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MOST_SESSIONS", 3)
    opened = Sessions(Operators([KEY]), time.monotonic)
    first, second, third = (opened.open(OPERATOR) for _ in range(3))
    assert opened.find(first) is not None
    fourth = opened.open(OPERATOR)
    assert [opened.find(one) is not None for one in (first, second, third, fourth)] == [True, False, True, True]


def test_attempts_of_many_addresses() -> None:
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    for number in range(19):
        attempts.failed(f"10.0.0.{number}")
        now[0] += 1
    assert attempts.wait("10.0.0.99") == 0
    attempts.failed("10.0.0.99")
    assert attempts.wait("10.0.0.100") == 41  # as many as are allowed to all
    now[0] += 41
    assert attempts.wait("10.0.0.100") == 0
    assert len(attempts._failures) < 20


def test_what_is_done_is_audited(control: FakeControl, tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    with serving_console(AuditedControl(control, log)) as url, logged_in(url) as client:
        client.post("/console/act", json=ACT)
        client.post("/console/act", json={"verb": "activate", "name": "swap"})
    found = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert [(one["action"], one["variant"], one["outcome"]) for one in found] == [
        ("pin", "base", "done"),
        ("activate", "swap", "refused"),
    ]
    assert {(one["from"], one["key"]) for one in found} == {("127.0.0.1", "console session 1")}


def test_the_link() -> None:
    assert console_link("0.0.0.0", 8001) == "http://127.0.0.1:8001/console"
    assert console_link("::1", 8001) == "http://[::1]:8001/console"
    assert console_link("gpu7", 8001) == "http://gpu7:8001/console"
