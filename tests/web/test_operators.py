"""Operators of a keys file at the admin API and the console: who may look and change, and whose name is noted."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from support.server.admin import KEY, FakeControl, serving_app
from support.server.console import logged_in
from support.server.tenants import entry, token_of, write_keys

from peanut_serve.tenants import watched
from peanut_serve.tenants.usage import USAGE, Used
from peanut_serve.tenants.watched import WatchedKeys
from peanut_serve.web.admin import admin_app
from peanut_serve.web.audit import AuditedControl, AuditLog
from peanut_serve.web.console.app import ConsoleHost, add_console
from peanut_serve.web.operators import Operators

V1 = "/admin/v1"
PIN = {"verb": "pin", "name": "base"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    entries = [entry("boss", role="admin"), entry("eye", role="read-only"), entry("team")]
    return write_keys(tmp_path / "keys.json", *entries)


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def app(file: Path, control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr(watched, "_LOOK_SECONDS", 0.0)
    operators = Operators([KEY], WatchedKeys(file))
    audited = AuditedControl(control, AuditLog(tmp_path / "audit.jsonl"))
    app = admin_app(audited, operators)
    add_console(app, ConsoleHost(audited, operators, 8001))
    return app


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with serving_app(app) as url:
        yield url


def audited(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(name)}"}


def test_read_only_changes_nothing_by_any_route(url: str, app: FastAPI, control: FakeControl) -> None:
    client = httpx.Client(base_url=url, headers=as_("eye"))
    routes = client.get(f"{V1}/openapi.json").json()["paths"]
    assert len(routes) > 10
    for template in routes:
        path = template.replace("{name}", "base")
        assert client.get(path).status_code in (200, 404, 405), path
        for method in ("POST", "DELETE", "PUT", "PATCH", "OPTIONS"):
            answer = client.request(method, path, json={"name": "new", "source": "s"})
            expected = 405 if path == "/healthz" else 403
            assert answer.status_code == expected, (method, path)
            if expected == 403:
                assert answer.json()["error"]["type"] == "ForbiddenError"
                assert "the key of eye is read-only" in answer.json()["error"]["message"]
    assert control.calls == []


def test_who_is_let_in(url: str, control: FakeControl) -> None:
    pin = f"{V1}/variants/base/pin"
    keys = {"boss": 200, "eye": 403, "team": 403, "nobody": 401}
    for name, status in keys.items():
        assert httpx.post(f"{url}{pin}", headers=as_(name)).status_code == status
    own = {b"Authorization": b"Bearer " + KEY.encode()}
    assert httpx.post(f"{url}{pin}", headers=own).status_code == 200  # the key beside the file
    for name, status in {"boss": 200, "eye": 200, "team": 403, "nobody": 401}.items():
        assert httpx.get(f"{url}{V1}/variants", headers=as_(name)).status_code == status
    hashed = {"Authorization": f"Bearer {entry('boss')['sha256']}"}
    assert httpx.get(f"{url}{V1}/variants", headers=hashed).status_code == 401
    assert control.calls == [("pin", "base", True)] * 2


def test_the_audit_log_has_the_names(url: str, tmp_path: Path) -> None:
    httpx.post(f"{url}{V1}/variants/base/pin", headers=as_("boss"))
    httpx.post(f"{url}{V1}/variants/base/pin", headers={b"Authorization": b"Bearer " + KEY.encode()})
    with logged_in(url, token_of("boss")) as browser:
        assert browser.post("/console/act", json=PIN).status_code == 200
    with logged_in(url) as browser:
        assert browser.post("/console/act", json=PIN).status_code == 200
    by_name, by_key, in_console, by_session = (one["key"] for one in audited(tmp_path))
    assert (by_name, in_console, by_session) == ("boss", "boss, console session 1", "console session 2")
    assert len(str(by_key)) == 12
    assert token_of("boss") not in (tmp_path / "audit.jsonl").read_text()


def test_the_console_of_a_read_only_key(url: str, control: FakeControl) -> None:
    with logged_in(url, token_of("eye")) as browser:
        assert '<body class="read-only">' in browser.get("/console").text
        assert browser.get("/console/live").status_code == 200
        trial = {"prompt": "p", "variants": ["base"]}
        for path, body in (("/console/act", PIN), ("/console/playground", trial), ("/console/nothing", {})):
            answer = browser.post(path, json=body)
            assert (answer.status_code, "is read-only" in answer.json()["error"]) == (403, True), path
        assert control.calls == []
        assert browser.post("/console/logout").status_code == 200
        assert browser.get("/console/live").status_code == 401
    with logged_in(url, token_of("boss")) as browser:
        assert "<body>" in browser.get("/console").text


def test_a_session_is_as_good_as_its_key(url: str, file: Path, control: FakeControl) -> None:
    """It ends with the key, also if the name gets another one, and follows its role."""
    with logged_in(url, token_of("boss")) as browser:
        assert browser.post("/console/act", json=PIN).status_code == 200
        write_keys(file, entry("boss", role="read-only"))
        assert browser.post("/console/act", json=PIN).status_code == 403
        assert browser.get("/console/live").status_code == 200
        write_keys(file, entry("boss", role="admin", sha256="ab" * 32))
        assert browser.post("/console/act", json=PIN).status_code == 401
        write_keys(file, entry("boss", role="admin"))
        assert browser.get("/console/live").status_code == 401  # it does not come back
    with httpx.Client(base_url=url, headers={"Origin": url}) as client:
        for name in ("team", "nobody"):
            assert client.post("/console/login", data={"key": token_of(name)}).status_code == 403
    assert len(control.calls) == 1


def test_usage(url: str) -> None:
    USAGE.add("v-usage", "t-usage", Used(2, 30, 4, 1.5))
    answer = httpx.get(f"{url}{V1}/usage", headers=as_("eye")).json()
    assert answer["since"].startswith("20")
    (found,) = [one for one in answer["usage"] if one["variant"] == "v-usage"]
    assert found == {
        "variant": "v-usage", "tenant": "t-usage", "requests": 2, "prompt_tokens": 30, "generated_tokens": 4,
        "engine_seconds": 1.5,
    }  # fmt: skip
