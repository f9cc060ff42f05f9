"""The bodies of all requests have one limit, on routes that need weights and on those that do not."""

import asyncio

import pytest
from support.server.call import Call
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until

from peanut_serve.errors import BodiesFullError
from peanut_serve.web.request_body import LARGEST, Bodies, ClientLimits

BODY = b'{"model":"v1"}'


@pytest.fixture
def run_rig(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    folder = tmp_path_factory.mktemp("bodies")
    return rig_runner(make_weights(folder), folder, monkeypatch)


def test_what_is_taken_is_given_back() -> None:
    bodies = Bodies(10)
    with bodies.share() as take:
        for _ in range(LARGEST):
            take(10)
        with pytest.raises(BodiesFullError) as refused, bodies.share() as other:
            other(1)
        assert bodies.taken == LARGEST * 10, "the body that was refused still counts"
    assert (bodies.taken, refused.value.status, refused.value.retry_after) == (0, 429, 1)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/abort_requests"])
def test_a_body_without_room_is_refused_and_its_connection_closed(run_rig: RunRig, path: str) -> None:
    async def test(rig: Rig) -> None:
        limits, bodies = ClientLimits(body_bytes=len(BODY)), Bodies(len(BODY))
        rig.engine.go.clear()
        running = [Call(rig, "/v1/completions", BODY, limits=limits, bodies=bodies) for _ in range(LARGEST)]
        await until(lambda: bodies.taken == LARGEST * len(BODY))
        refused = Call(rig, path, BODY, limits=limits, bodies=bodies)
        assert await refused.refusal() == (429, "BodiesFullError", "1")
        assert refused.header("connection") == "close"
        rig.engine.go.set()
        assert {status for status, _ in await asyncio.gather(*(call.answer() for call in running))} == {200}
        assert bodies.taken == 0
        assert (await Call(rig, "/v1/completions", BODY, limits=limits, bodies=bodies).answer())[0] == 200

    run_rig(test)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens", "/abort_requests"])
def test_routes_without_weights_have_the_limit_of_one_body_too(run_rig: RunRig, path: str) -> None:
    async def test(rig: Rig) -> None:
        limits = ClientLimits(body_bytes=len(BODY), body_seconds=0.2)
        assert (await Call(rig, path, BODY, limits=limits).answer())[0] == 200
        large = Call(rig, path, BODY + b" ", limits=limits)
        assert (await large.refusal())[:2] == (413, "RequestTooLargeError")
        slow = Call(rig, path, BODY, limits=limits)
        slow.uploads.clear()
        assert (await slow.refusal())[:2] == (408, "RequestTimeoutError")

    run_rig(test)
