"""Tenants at the server of classifiers: whom each route answers, how many inputs wait, and what is counted."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.classify.serving import PATIENCE, classifying
from support.classify.stand_ins import stand_in
from support.server.tenants import entry, tenants_of, token_of, write_keys

from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.errors import TenantLimitError
from peanut_serve.tenants.visits import Tenants, current_visit, take_inputs

KEY = "a-key"
OPEN = ("/health", "/ready", "/metrics", "/openapi.json", "/v2/health/live", "/v2/health/ready")


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(name)}"}


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    entries = [
        entry("one", variants=["mood"]),
        entry("slow", requests_per_minute=1),
        entry("boss", role="admin"),
    ]
    return tenants_of(write_keys(tmp_path / "keys.json", *entries))


def test_every_route_is_checked(tmp_path: Path, tenants: Tenants) -> None:
    """By the routes of the application itself, with every method."""
    tasks = [stand_in(tmp_path / "served" / name) for name in ("mood", "other")]
    with (
        classifying(*tasks, keys=(KEY,), tenants=tenants) as (url, _),
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        paths = client.get("/openapi.json").json()["paths"]
        assert len(paths) > 10
        for template in paths:
            path = template.replace("{name}", "other").replace("{version}", "1")
            for method in ("GET", "POST", "PUT", "HEAD"):
                if template in OPEN:
                    continue
                status = client.request(method, path, headers=as_("one"), json={"inputs": "a"}).status_code
                expected = (403,) if "{name}" in template else (200, 405)
                assert status in expected, (method, path, status)
                assert client.request(method, path, headers=as_("boss")).status_code == 403
                assert client.request(method, path, headers=as_("nobody")).status_code == 401
        for path in OPEN:
            assert client.get(path, headers=as_("nobody")).status_code == 200
        assert client.get("/models", headers=as_("one")).json() == ["mood"]
        assert client.get("/models", headers={"Authorization": f"Bearer {KEY}"}).json() == ["mood", "other"]
        for path in ("/models/mood:int8", "/models/ot%68er", "/v2/models/other/ready", "/v2/models/none/infer"):
            refused = client.post(path, headers=as_("one"))
            assert refused.status_code == 403, path
        assert refused.json() == {"error": "the key of one may not use none", "type": "ForbiddenError"}
        assert client.post("/models/mood", headers=as_("one"), json={"inputs": "a"}).status_code == 422  # no graph
        answered = client.get("/models", headers=as_("slow"))
        assert (answered.status_code, answered.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        assert "x-ratelimit-limit-requests" not in client.get("/models", headers=as_("one")).headers
        refused = client.get("/models", headers=as_("slow"))
        assert (refused.status_code, 50 <= int(refused.headers["retry-after"]) <= 60) == (429, True)
        assert refused.headers["x-ratelimit-limit-requests"] == "1"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_every_refusal_tells_the_rate(tmp_path: Path) -> None:
    """Also one before the body is read."""
    tenants = tenants_of(write_keys(tmp_path / "keys.json", entry("one", variants=["mood"], requests_per_minute=60)))
    with (
        classifying(stand_in(tmp_path / "served" / "mood"), tenants=tenants) as (url, _),
        httpx.Client(base_url=url, timeout=PATIENCE, headers=as_("one")) as client,
    ):
        asked = {
            403: ("/models/other", {}, b"{}"),
            404: ("/none", {}, b"{}"),
            400: ("/models/mood", {"Content-Encoding": "gzip"}, b"{}"),
            413: ("/models/mood", {}, b" " * ((16 << 20) + 1)),
            422: ("/models/mood", {"Content-Type": "application/json"}, b'{"inputs": "a"}'),
        }
        for status, (path, headers, content) in asked.items():
            refused = client.post(path, headers=headers, content=content)
            assert refused.status_code == status
            told = [name for name, _ in refused.headers.multi_items() if name.startswith("x-ratelimit-")]
            assert len(told) == len(set(told)) == 3, (status, told)


def test_an_unknown_task_tells_no_other_names(tmp_path: Path) -> None:
    """A pattern lets a tenant ask for names that there are not."""
    tenants = tenants_of(write_keys(tmp_path / "keys.json", entry("next", variants=["next-*"]), entry("all")))
    with (
        classifying(stand_in(tmp_path / "served" / "secret"), tenants=tenants) as (url, _),
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        asked = (("GET", "/v2/models/next-1"), ("POST", "/models/next-1"), ("POST", "/v2/models/next-1/infer"))
        for method, path in asked:
            found = client.request(method, path, headers=as_("next"), json={"inputs": "a"})
            assert found.status_code == 404
            assert found.json() == {"error": "there is no task next-1", "type": "UnknownVariantError"}, path
            assert "secret" in client.request(method, path, headers=as_("all"), json={"inputs": "a"}).text


def samples(url: str, tenant: str) -> dict[tuple[str, str], float]:
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (one.name.removeprefix("peanut_usage_"), one.labels["variant"]): one.value
        for one in found
        if one.name.startswith("peanut_usage_") and one.labels["tenant"] == tenant
    }


@pytest.mark.slow  # a model is traced
def test_what_a_tenant_has_used(tmp_path: Path) -> None:
    from support.classify.exports import export_one
    from transformers import BertForSequenceClassification

    tenants = tenants_of(write_keys(tmp_path / "keys.json", entry("counted")))
    name = "mood"
    folder = export_one(tmp_path / name, BertForSequenceClassification, ["bad", "fair", "good"])
    with classifying(folder, tenants=tenants) as (url, _):
        for body in ({"inputs": "good"}, {"inputs": "bad"}, {"inputs": 3}, {}):
            httpx.post(f"{url}/models/{name}", headers=as_("counted"), json=body, timeout=PATIENCE)
        httpx.post(f"{url}/models/none", headers=as_("counted"), json={"inputs": "good"}, timeout=PATIENCE)
        httpx.get(f"{url}/v2/models/{name}", headers=as_("counted"), timeout=PATIENCE)
        found = samples(url, "counted")
        assert found["requests_total", name] == 2
        assert found["engine_seconds_total", name] > 0
        assert {variant for _, variant in found} == {name}


def test_inputs_of_one_tenant_leave_room(tmp_path: Path) -> None:
    tenants = tenants_of(write_keys(tmp_path / "keys.json", entry("many"), entry("few")))

    def take(name: str, count: int) -> Any:
        current_visit.set(asyncio.run(tenants.enter(token_of(name).encode())))
        return take_inputs(count, 10)

    try:
        large = take("many", 8)  # one request alone may be larger than half
        with pytest.raises(TenantLimitError, match="8 inputs of many wait; with 1 more"):
            take("many", 1)
        take("few", 5)
        large()
        give_back = take("many", 3)
        take("many", 2)
        with pytest.raises(TenantLimitError):
            take("many", 1)
        give_back()
        take("many", 3)
        current_visit.set(None)
        take_inputs(1000, 10)  # of clients without a tenant: the queue itself has a limit
    finally:
        current_visit.set(None)


def test_the_server_counts_inputs_by_tenant(tmp_path: Path) -> None:
    """A tenant that has half of the places gets no more of them until its requests are answered."""
    tenants = tenants_of(write_keys(tmp_path / "keys.json", entry("many")))
    server = TaskServer([stand_in(tmp_path / "served" / "mood")])

    async def test() -> None:
        async with server:
            hold = asyncio.Event()

            async def waiting() -> str:
                await hold.wait()
                return "answered"

            current_visit.set(await tenants.enter(token_of("many").encode()))
            first = [asyncio.create_task(server._admitted(64, waiting())) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(TenantLimitError, match="128 inputs of many wait"):
                await server._admitted(1, waiting())
            current_visit.set(None)
            other = asyncio.create_task(server._admitted(64, waiting()))
            hold.set()
            assert await asyncio.gather(*first, other) == ["answered"] * 3
            current_visit.set(await tenants.enter(token_of("many").encode()))
            assert await server._admitted(64, waiting()) == "answered"
            current_visit.set(None)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_an_answer_is_json(tmp_path: Path, tenants: Tenants) -> None:
    with classifying(stand_in(tmp_path / "served" / "mood"), tenants=tenants) as (url, _):
        found = httpx.get(f"{url}/models", timeout=PATIENCE)
        assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        assert set(json.loads(found.content)) == {"error", "type"}
