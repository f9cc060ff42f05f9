"""Tenants at the middleware: no route answers a key without the right, and no tenant takes the room of another."""

import asyncio
import json
from itertools import product
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from support.server.call import Call
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until
from support.server.tenants import entry, tenants_of, token_of, write_keys
from support.server.weights import Weights

from peanut_serve.tenants.visits import Tenants, current_visit, may_use
from peanut_serve.web.request_body import ClientLimits
from peanut_serve.web.routes import _ACCESS, _REASONS, Access, access_to

HEADER = "x_amzn_sagemaker_adapter_identifier"
COMPLETIONS, STREAM = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("tenants"))


@pytest.fixture(params=["lora", "merged", "auto"])
def run_rig(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> RunRig:
    """In every mode."""
    run = rig_runner(weights, tmp_path, monkeypatch)
    return lambda test, **options: run(test, mode=request.param, **options)


@pytest.fixture
def run_merged(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    return rig_runner(weights, tmp_path, monkeypatch)


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    entries = [
        entry("one", variants=["v1"]),
        entry("all"),
        entry("nothing", variants=[]),
        entry("boss", role="admin"),
        entry("eye", role="read-only"),
    ]
    return tenants_of(write_keys(tmp_path / "keys.json", *entries), most_waiting=8)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token_of(name)}"}


def usage(variant: str, tenant: str, family: str = "requests") -> float:
    labels = {"variant": variant, "tenant": tenant}
    return REGISTRY.get_sample_value(f"peanut_usage_{family}_total", labels) or 0.0


def test_no_route_answers_a_key_without_the_right(run_merged: RunRig, tenants: Tenants) -> None:
    """Every route, with every method, and every way to name a variant, or none."""

    async def test(rig: Rig) -> None:
        paths = [*_ACCESS, *_REASONS, "/a/route/of/a/later/vllm", "/v1/completions/", "//v1/completions"]
        bodies = ({}, b"", [], {"model": None}, {"model": ""}, {"model": "v2"}, {"model": "base"}, {"model": "none"})
        wrong = [("one", body) for body in bodies] + [(name, {"model": "v1"}) for name in ("nothing", "boss", "eye")]
        for path, (name, body), method in product(paths, wrong, ("POST", "GET", "DELETE", "PUT", "HEAD")):
            access = access_to(path)
            if access is Access.OPEN:
                continue
            call = Call(rig, path, body, method, tenants=tenants, **bearer(name))
            status = (await call.answer())[0]
            if name in ("one", "nothing") and access in (Access.ANSWER, Access.NAMES) and method != "POST":
                assert status == 200  # vLLM answers these with 405, and /v1/models by the names that the key may use
                continue
            if access is Access.REFUSED and name in ("one", "nothing"):
                assert status == 404
            else:
                assert status == 403, (path, name, body, method)
            assert call.admitted in ([], [None])
        for path, token in product(paths, ("", "Bearer", "Bearer wrong", f"Basic {token_of('all')}")):
            if access_to(path) is not Access.OPEN:
                call = Call(
                    rig, path, {"model": "v1"}, tenants=tenants, **({"authorization": token} if token else {})
                )
                assert (await call.answer())[0] == 401, (path, token)
                assert call.header("www-authenticate") == "Bearer"
        assert rig.swaps == 0
        assert all(usage.requests == 0 for usage in rig.server.usage.values())

    run_merged(test)


def test_the_ways_to_name_a_variant(run_rig: RunRig, tenants: Tenants) -> None:
    async def test(rig: Rig) -> None:
        for path, body, headers, status in (
            (COMPLETIONS, {"model": "v1"}, {}, 200),
            (COMPLETIONS, {"model": "v2"}, {HEADER: "v1"}, 403),
            ("/invocations", {"model": "v1"}, {}, 200),
            ("/invocations", {}, {HEADER: "v1"}, 200),
            ("/invocations", {}, {HEADER: "v2"}, 403),
            ("/invocations", {}, {}, 403),
            ("/invocations", {"model": "v1"}, {HEADER: "v2"}, 400),
            ("/tokenize", {"model": "v1"}, {}, 200),
            ("/tokenize", {"model": "v2"}, {}, 403),
            ("/tokenize", {}, {}, 403),
            ("/tokenize", b"not JSON", {}, 400),
            ("/v1/responses", {"model": "v1", "previous_response_id": "resp_of_somebody"}, {}, 403),
        ):
            call = Call(rig, path, body, tenants=tenants, **headers, **bearer("one"))
            assert (await call.answer())[0] == status, (path, body, headers)
            assert call.header("x-peanut-variant") == ("v1" if status == 200 and path != "/tokenize" else None)
        for body in ({}, {"model": "v2"}, {"model": "base"}):
            assert (await Call(rig, COMPLETIONS, body, tenants=tenants, **bearer("all")).answer())[0] == 200
        call = Call(rig, "/v1/responses", {"model": "v1", "previous_response_id": "resp_of_somebody"})
        assert (await call.answer())[0] == 200  # without a keys file, as before

    run_rig(test)


def test_a_refusal_has_the_form_of_openai_and_tells_no_other_names(run_merged: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        tenants = tenants_of(write_keys(tmp_path / "keys.json", entry("team", variants=["v1", "next-*"])))
        call = Call(rig, COMPLETIONS, {"model": "v2"}, tenants=tenants, **bearer("team"))
        assert await call.refusal() == (403, "ForbiddenError", None)
        call = Call(rig, COMPLETIONS, {"model": "next-1"}, tenants=tenants, **bearer("team"))
        status, text = await call.answer()
        assert (status, json.loads(text)["error"]["message"]) == (404, "there is no variant next-1")
        before = REGISTRY.get_sample_value("peanut_refused_requests_total", {"tenant": "team", "reason": "variant"})
        invented = Call(rig, COMPLETIONS, {"model": "invented\n" * 100}, tenants=tenants, **bearer("team"))
        status, text = await invented.answer()
        assert (status, len(text) < 400) == (403, True)
        after = REGISTRY.get_sample_value("peanut_refused_requests_total", {"tenant": "team", "reason": "variant"})
        assert after == (before or 0) + 1
        assert usage("next-1", "team") == 0

    run_merged(test)


def test_usage_of_every_mode(run_rig: RunRig, tenants: Tenants) -> None:
    async def test(rig: Rig) -> None:
        before = {pair: usage(*pair) for pair in (("v1", "one"), ("v1", "all"), ("base", "all"), ("v2", "one"))}
        for name, variant in (("one", "v1"), ("one", "v1"), ("all", "v1"), ("all", "base"), ("one", "v2")):
            await Call(rig, COMPLETIONS, {"model": variant}, tenants=tenants, **bearer(name)).answer()
        await Call(rig, COMPLETIONS, {"model": "none"}, tenants=tenants, **bearer("all")).answer()
        counted = {pair: usage(*pair) - count for pair, count in before.items()}
        assert counted == {("v1", "one"): 2, ("v1", "all"): 1, ("base", "all"): 1, ("v2", "one"): 0}
        assert usage("v1", "one", "engine_seconds") > 0
        both = Call(rig, COMPLETIONS, {"model": "v2"}, keys=[token_of("one")], tenants=tenants, **bearer("one"))
        assert (await both.answer())[0] == 403  # a key that is also in the file has its limits
        others = usage("v1", "other")
        own = {"keys": ["key"], "authorization": "Bearer key"}
        await Call(rig, COMPLETIONS, {"model": "v1"}, tenants=tenants, **own).answer()
        assert usage("v1", "other") == others + 1

    run_rig(test)


def test_usage_outlives_the_name(run_merged: RunRig, tenants: Tenants) -> None:
    async def test(rig: Rig) -> None:
        await rig.server.register("new", "v1")
        await Call(rig, COMPLETIONS, {"model": "new"}, tenants=tenants, **bearer("all")).answer()
        before = usage("other", "all")
        assert usage("new", "all") == 1
        await rig.server.unregister("new", drain=True)
        assert (usage("new", "all"), usage("other", "all")) == (0, before + 1)
        assert REGISTRY.get_sample_value("peanut_usage_requests_total", {"variant": "new", "tenant": "all"}) is None

    run_merged(test)


def test_the_time_of_a_client_that_leaves_is_counted(run_merged: RunRig, tenants: Tenants) -> None:
    async def test(rig: Rig) -> None:
        requests, seconds = usage("v1", "one"), usage("v1", "one", "engine_seconds")
        rig.engine.go.clear()
        call = Call(rig, STREAM, {"model": "v1"}, tenants=tenants, **bearer("one"))
        call.reads.clear()
        await until(lambda: len(rig.server.gate.running) == 1)
        await asyncio.sleep(0.05)
        call.task.cancel()
        await asyncio.wait([call.task])
        assert usage("v1", "one") == requests + 1
        assert usage("v1", "one", "engine_seconds") >= seconds + 0.05
        rig.engine.go.set()

    run_merged(test)


def test_one_tenant_leaves_room_in_the_queue(run_merged: RunRig, tenants: Tenants) -> None:
    async def test(rig: Rig) -> None:
        rig.engine.go.clear()
        running = Call(rig, COMPLETIONS, {"model": "base"}, tenants=tenants, **bearer("all"))
        await until(lambda: rig.engine.running == 1)
        flood = [Call(rig, COMPLETIONS, {"model": "v1"}, tenants=tenants, **bearer("one")) for _ in range(20)]
        await until(lambda: sum(call.task.done() for call in flood) == 16)
        refused = [await call.refusal() for call in flood if call.task.done()]
        assert set(refused) == {(429, "TenantLimitError", "1")}
        other = Call(rig, COMPLETIONS, {"model": "v2"}, tenants=tenants, **bearer("all"))
        await until(lambda: rig.waiting == 5)  # four of the flood, and the other
        rig.engine.go.set()
        assert [(await call.answer())[0] for call in (running, other)] == [200, 200]
        assert [(await call.answer())[0] for call in flood].count(200) == 4
        again = Call(rig, COMPLETIONS, {"model": "v1"}, tenants=tenants, **bearer("one"))
        assert (await again.answer())[0] == 200  # all places were given back

    run_merged(test, max_queue=8, max_wait=60)


def test_places_are_given_back_however_a_request_ends(run_merged: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        tenants = tenants_of(write_keys(tmp_path / "keys.json", entry("narrow", places=1)))
        limits = ClientLimits(body_bytes=1000, body_seconds=0.05, stall_seconds=0.1)

        def ask(path: str, body: object) -> Call:
            return Call(rig, path, body, tenants=tenants, limits=limits, **bearer("narrow"))

        for path, body in ((COMPLETIONS, b"{"), (COMPLETIONS, b"x" * 2000), ("/v1/responses/1", {}), ("/none", {})):
            assert (await ask(path, body).answer())[0] in (400, 403, 404, 413)
        late = ask(COMPLETIONS, {})
        late.uploads.clear()
        assert (await late.refusal())[0] == 408
        unread = ask(STREAM, {"model": "base"})
        unread.reads.clear()
        await asyncio.wait([unread.task])
        rig.engine.go.clear()
        left = ask(COMPLETIONS, {"model": "base"})
        await until(lambda: rig.engine.running == 1)
        assert await ask(COMPLETIONS, {}).refusal() == (429, "TenantLimitError", "1")
        left.task.cancel()
        await asyncio.wait([left.task])
        rig.engine.fail("apply")
        rig.engine.go.set()
        assert (await ask(COMPLETIONS, {"model": "v1"}).answer())[0] == 500
        assert (await ask(COMPLETIONS, {"model": "v1"}).answer())[0] in (200, 500)
        assert (await ask("/tokenize", {"model": "v1"}).answer())[0] == 200
        assert (await ask("/v1/models", None).answer())[0] == 200

    run_merged(test)


def test_a_request_knows_its_own_tenant(run_merged: RunRig, tenants: Tenants) -> None:
    """What is listed, and whose tokens are counted, is decided in the context of the request."""

    async def test(rig: Rig) -> None:
        seen = []

        class Looking(Call):
            async def _app(self, scope: dict, receive: object, send: object) -> None:
                visit = current_visit.get()
                seen.append((visit.tenant if visit else None, [name for name in ("v1", "v2") if may_use(name)]))
                await super()._app(scope, receive, send)

        calls = [Looking(rig, "/v1/models", None, "GET", tenants=tenants, **bearer(name)) for name in ("one", "all")]
        calls.append(Looking(rig, COMPLETIONS, {"model": "v1"}, tenants=tenants, **bearer("one")))
        await asyncio.gather(*(call.task for call in calls))
        assert sorted(seen) == [("all", ["v1", "v2"]), ("one", ["v1"]), ("one", ["v1"])]
        assert current_visit.get() is None

    run_merged(test)
