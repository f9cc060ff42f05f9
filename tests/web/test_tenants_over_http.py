"""Tenants over real HTTP: what OpenAI's client and curl see, also while the keys file changes."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until
from support.server.tenants import OPERATOR_KEY, entry, serving_tenants, tenants_of, token_of, write_keys
from support.server.weights import Weights

from peanut_serve.tenants import watched

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("tenants"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    monkeypatch.setattr(watched, "_LOOK_SECONDS", 0.05)
    return rig_runner(weights, tmp_path, monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    entries = [
        entry("team", variants=["v*"], requests_per_minute=3),
        entry("narrow", places=1),
        entry("wide"),
        entry("boss", role="admin"),
    ]
    return write_keys(tmp_path / "keys.json", *entries)


Served = Callable[[Rig, str], Awaitable[None]]


def run(run_rig: RunRig, file: Path, test: Served) -> None:
    async def served(rig: Rig) -> None:
        async with serving_tenants(rig, tenants_of(file)) as url:
            await test(rig, url)

    run_rig(served)


def client_of(url: str, token: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=30)


async def curl(url: str, token: str, body: object = None) -> tuple[int, dict[str, str], dict]:
    """Status, headers and JSON."""
    data = [] if body is None else ["-d", json.dumps(body), "-H", "Content-Type: application/json"]
    command = ["curl", "-s", "-i", "--max-time", "30", url, "-H", f"Authorization: Bearer {token}", *data]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    head, _, content = out.decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, json.loads(content)


def test_what_openais_client_sees(run_rig: RunRig, file: Path) -> None:
    async def test(rig: Rig, url: str) -> None:
        team = client_of(url, token_of("team"))
        assert [model.id async for model in await team.models.list()] == ["v1", "v2", "v3"]
        done = await team.chat.completions.create(model="v1", messages=CHAT)
        assert done.choices[0].message.content == rig.expected["v1"][:8]
        with pytest.raises(openai.PermissionDeniedError, match="the key of team may not use base"):
            await team.chat.completions.create(model="base", messages=CHAT)
        with pytest.raises(openai.RateLimitError, match="team may send 3 requests a minute") as limited:
            await team.chat.completions.create(model="v1", messages=CHAT)
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 20
        assert limited.value.status_code == 429
        for token in ("wrong", token_of("nobody"), entry("team")["sha256"]):
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                await client_of(url, token).chat.completions.create(model="v1", messages=CHAT)
        with pytest.raises(openai.PermissionDeniedError, match="has the role admin"):
            await client_of(url, token_of("boss")).models.list()
        operator = client_of(url, OPERATOR_KEY)  # keys beside the file go on working
        assert (await operator.chat.completions.create(model="base", messages=CHAT)).choices

    run(run_rig, file, test)


def test_a_stream_keeps_its_place_until_its_end(run_rig: RunRig, file: Path) -> None:
    async def test(rig: Rig) -> None:
        go_on = asyncio.Event()
        async with serving_tenants(rig, tenants_of(file), go_on) as url:
            narrow = client_of(url, token_of("narrow"))

            async def ask(is_stream: bool = False) -> Any:
                return await narrow.chat.completions.create(model="v1", messages=CHAT, stream=is_stream)

            stream = await ask(is_stream=True)
            with pytest.raises(openai.RateLimitError, match="narrow has 1 requests in the server, and may have 1"):
                await ask()
            go_on.set()
            assert [chunk.choices[0].delta.content async for chunk in stream] == [rig.expected["v1"][:8]]
            assert (await ask()).choices
            go_on.clear()
            left = await ask(is_stream=True)
            await left.close()  # the client closes its connection
            await until(lambda: not rig.server.gate.running)
            await asyncio.sleep(0.05)
            assert (await ask()).choices

    run_rig(test)


def test_what_curl_sees(run_rig: RunRig, file: Path) -> None:
    async def test(rig: Rig, url: str) -> None:
        chat = f"{url}/v1/chat/completions"
        body = {"model": "v1", "messages": CHAT}
        status, headers, answer = await curl(chat, "wrong", body)
        assert (status, headers["www-authenticate"], answer["error"]["code"]) == (401, "Bearer", 401)
        status, headers, answer = await curl(chat, token_of("team"), {"messages": CHAT})
        assert (status, answer["error"]["type"]) == (403, "ForbiddenError")
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        for expected in (200, 200, 429):
            status, headers, answer = await curl(chat, token_of("team"), body)
            assert status == expected
        assert (int(headers["retry-after"]) > 0, answer["error"]["type"]) == (True, "TenantLimitError")
        status, _, answer = await curl(f"{url}/v1/models", token_of("wide"))
        assert [one["id"] for one in answer["data"]] == ["base", "v1", "v2", "v3"]

    run(run_rig, file, test)


def test_keys_change_under_a_running_server(run_rig: RunRig, file: Path) -> None:
    async def test(rig: Rig, url: str) -> None:
        async def status_of(name: str) -> int:
            return (await curl(f"{url}/v1/models", token_of(name)))[0]

        async def metrics() -> str:
            async with httpx.AsyncClient() as client:
                return (await client.get(f"{url}/metrics")).text

        assert [await status_of(name) for name in ("wide", "new")] == [200, 401]
        write_keys(file, entry("new"), entry("team"))
        await asyncio.sleep(0.1)
        assert [await status_of(name) for name in ("wide", "new", "team")] == [401, 200, 200]
        file.write_text("keys: [")
        await asyncio.sleep(0.1)
        assert [await status_of(name) for name in ("wide", "new", "nobody")] == [401, 200, 401]
        assert "peanut_keys_current 0.0" in await metrics()
        write_keys(file, entry("wide"))
        await asyncio.sleep(0.1)
        assert [await status_of(name) for name in ("wide", "new")] == [200, 401]
        text = await metrics()
        assert "peanut_keys_current 1.0" in text
        assert token_of("wide") not in text
        assert entry("wide")["sha256"] not in text

    run(run_rig, file, test)
