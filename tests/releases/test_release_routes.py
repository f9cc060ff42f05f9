"""Releases over HTTP: the routes of the admin port, with a server behind them and with one that is a fake."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from support.server.admin import KEY, FakeControl, serving_app
from support.server.call import Call
from support.server.releases import FakeReleases, releases_of, says, write_canaries
from support.server.rig import Rig, RunRig

from peanut_serve.releases.routes import add_releases
from peanut_serve.releases.schema import Weighing
from peanut_serve.web.admin import admin_app
from peanut_serve.web.connections import bind, serve_on
from peanut_serve.web.operator import VariantControl

V1 = "/admin/v1"
HEADERS = {b"Authorization": b"Bearer " + KEY.encode()}
KEY_IN_ASCII = "secret"


def fake_app(key: str = KEY) -> tuple[FastAPI, FakeReleases]:
    app, releases = admin_app(FakeControl(), key), FakeReleases()
    add_releases(app, releases)
    return app, releases


@pytest.fixture
def fake() -> Iterator[tuple[httpx.Client, FakeReleases]]:
    app, releases = fake_app()
    with serving_app(app) as url, httpx.Client(base_url=f"{url}{V1}", headers=HEADERS) as client:
        yield client, releases


def test_every_route(fake: tuple[httpx.Client, FakeReleases]) -> None:
    client, releases = fake
    assert [one["name"] for one in client.get("/releases").json()] == ["gsm8k"]
    assert client.get("/releases/user/release").json()["name"] == "user/release"
    assert client.get("/releases/none").status_code == 404
    assert client.post("/releases/gsm8k/hold").status_code == 204
    assert client.post("/releases/gsm8k/stage").json()["state"] == "staged"
    client.post("/releases/user%2Frelease/stage", json={"source": "other"})
    client.post("/releases/gsm8k/check")
    client.post("/releases/gsm8k/weight", json={"weight": 10, "max_error_rate": 0.2})
    client.post("/releases/gsm8k/promote", json={"force": True})
    client.post("/releases/gsm8k/rollback", json={"reason": "wrong"})
    assert releases.calls == [
        ("hold", "gsm8k"),
        ("stage", "gsm8k", None),
        ("stage", "user/release", "other"),
        ("check", "gsm8k"),
        ("weigh", "gsm8k", Weighing(weight=10, max_error_rate=0.2)),
        ("promote", "gsm8k", True),
        ("rollback", "gsm8k", "wrong"),
    ]
    for wrong in ({"weight": 101}, {"weight": -1}, {}, {"weight": 5, "min_requests": 0}, {"weight": 5, "more": 1}):
        assert client.post("/releases/gsm8k/weight", json=wrong).status_code == 422
    assert len(releases.calls) == 7


def test_nothing_is_done_without_the_key(fake: tuple[httpx.Client, FakeReleases]) -> None:
    client, releases = fake
    del client.headers["Authorization"]
    for verb in ("hold", "stage", "check", "weight", "promote", "rollback"):
        assert client.post(f"/releases/gsm8k/{verb}", json={"weight": 1}).status_code == 401
    assert client.get("/releases").status_code == 401
    assert releases.calls == []


def test_the_openapi_document(fake: tuple[httpx.Client, FakeReleases]) -> None:
    document = fake[0].get("/openapi.json").json()
    paths = {path: methods for path, methods in document["paths"].items() if "/releases" in path}
    assert len(paths) == 8
    for methods in paths.values():
        for route in methods.values():
            assert route["summary"]
            assert route["security"] == [{"adminKey": []}]
            assert {"401", "default"} <= set(route["responses"])
    for model in ("ReleaseStatus", "CanaryStatus", "EventStatus", "Staging", "Weighing", "Promotion", "Reason"):
        assert all(field["description"] for field in document["components"]["schemas"][model]["properties"].values())


@pytest.mark.slow
def test_whatever_the_schema_allows_and_does_not() -> None:
    headers = {"Authorization": f"Bearer {KEY_IN_ASCII}"}
    schema = schemathesis.openapi.from_asgi(f"{V1}/openapi.json", fake_app(KEY_IN_ASCII)[0], headers=headers)
    operations = [one.ok() for one in schema.get_all_operations() if "/releases" in one.ok().path]
    assert len(operations) == 8
    for operation in operations:

        @settings(max_examples=30)
        @given(
            case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
            | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        )
        def check(case: schemathesis.Case) -> None:
            response = case.call(headers=headers)
            case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

        check()


def test_a_release_over_http(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    """A real socket, a real server, and the audit log of what was asked for."""

    async def test(rig: Rig) -> None:
        old, new = [(await rig.server.prepare(name)).digest for name in ("v1", "v2")]
        write_canaries(tasks / "v2", says(rig.expected["v2"]))
        app = admin_app(VariantControl(rig.server), KEY)
        add_releases(app, releases_of(rig, tmp_path / "audit.jsonl"))
        listener = bind("127.0.0.1", 0)
        serving = asyncio.create_task(serve_on(app, listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}{V1}"
        async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=30) as client:
            staged = await client.post("/releases/v1/stage", json={"source": "v2"})
            assert (staged.status_code, staged.json()["passed"], staged.json()["digest"]) == (200, True, new)
            again = await client.post("/releases/v1/stage", json={"source": "v3"})
            assert (again.status_code, again.json()["error"]["type"]) == (409, "ReleaseError")
            assert (await client.post("/variants/v1/reload")).status_code == 409
            await client.post("/releases/v1/weight", json={"weight": 100})
            call = Call(rig, "/v1/completions", {"model": "v1"})
            assert await call.answer() == (200, rig.expected["v2"])
            listed = {one["name"]: one for one in (await client.get("/variants")).json()}
            assert (listed["v1"]["digest"], listed["v1@staged"]["digest"]) == (old, new)
            promoted = (await client.post("/releases/v1/promote")).json()
            assert (promoted["state"], promoted["events"][-1]["action"]) == ("promoted", "promote")
            shown = (await client.get("/variants/v1")).json()
            assert (shown["digest"], shown["previous"], shown["held"]) == (new, [old], True)
        serving.cancel()
        await asyncio.wait([serving])
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        found = [(one["action"], one["outcome"], one["staged"], one["old"], one["new"]) for one in lines]
        assert found == [
            ("release stage", "done", new, old, old),
            ("release stage", "refused", new, old, old),
            ("release weight", "done", new, old, old),
            ("release promote", "done", new, old, new),
        ]
        assert {one["from"] for one in lines} == {"127.0.0.1"}
        assert {len(one["key"]) for one in lines} == {12}

    run_rig(test)
