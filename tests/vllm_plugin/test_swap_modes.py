"""Other swap modes with the real vLLM: LoRA where possible, salted prefixes, models that cannot be swapped."""

import asyncio
import fcntl
import json
import re
import shutil
import socket
import struct
import subprocess
import termios
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from support.engines.serving import (
    PROGRAM,
    QUESTIONS,
    Server,
    answer,
    environment,
    free_port,
    serving,
    stalled_reader,
)
from support.paths import ROOT
from support.server.console import logged_in
from support.server.exposition import check_families
from support.server.gateway import metric_specs, read_endpoint, samples_of
from support.server.tenants import entry, token_of, write_keys
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from converters import merge
from peanut_serve.web.routes import Access, access_to, is_known

pytestmark = pytest.mark.vllm

ADAPTERS = ROOT / "examples" / "adapters"
BASE = "smollm2-135m-instruct"
RIGHT = {"smollm2-json": '{"answer": "green"}', "upper-folder": "GRASS IS GREEN."}


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An adapter, which can be expressed as LoRA, and a merged folder, which cannot."""
    folder = tmp_path_factory.mktemp("auto")
    shutil.copytree(ADAPTERS / "smollm2-json", folder / "variants" / "smollm2-json")
    merge(smollm2, ADAPTERS / "smollm2-upper", folder / "variants" / "upper-folder")
    port = str(free_port())
    (folder / "admin-port").write_text(port)
    options = (
        "--mode", "auto", "--prefix-cache", "salted", "--state", str(folder / "state"), "--api-key", "none",
        "--keys", str(write_keys(folder / "keys.json", entry("team", variants=["smollm2-j*"]))),
        "--admin-port", port, "--drain-timeout", "5",
        "--enable-prompt-tokens-details", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
    )  # fmt: skip
    variables = {"PEANUT_ADMIN_KEY": "secret", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with serving(smollm2, folder / "variants", folder, *options, **variables) as running:
        yield running


def admin(server: Server, method: str, path: str, body: object = None) -> httpx.Response:
    port = (server.log.parent / "admin-port").read_text()
    url = f"http://127.0.0.1:{port}/admin/v1/variants{path}"
    return httpx.request(method, url, json=body, headers={"Authorization": "Bearer secret"}, timeout=120)


def say(server: Server, variant: str) -> tuple[str, str]:
    """The answer to a question, and the digest of the weights that gave it."""
    raw = server.client.with_raw_response.chat.completions.create(
        model=variant, messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_tokens=16
    )
    assert raw.headers["x-peanut-variant"] == variant
    assert raw.headers["x-peanut-path"] == {"upper-folder": "merged", BASE: "base"}.get(variant, "lora")
    return str(raw.parse().choices[0].message.content), raw.headers["x-peanut-digest"]


def swaps(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        text = response.read().decode()
    return {name: float(n) for name, n in re.findall(r'peanut_swaps_total{outcome="done",variant="(.*)"} (.*)', text)}


def test_lora_where_possible(server: Server) -> None:
    """Both are answered at the same time, without a swap for the adapter."""

    async def ask(variant: str) -> tuple[str, str]:
        found = await server.async_client.chat.completions.create(
            model=variant, messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_tokens=16
        )
        return variant, str(found.choices[0].message.content)

    async def ask_all() -> list[tuple[str, str]]:
        return await asyncio.gather(*(ask(variant) for variant in list(RIGHT) * 6))

    for variant, text in asyncio.run(ask_all()):
        assert text == RIGHT[variant]
    assert answer(server.client, BASE, QUESTIONS[1], 8) not in RIGHT.values()
    assert set(swaps(server)) == {"upper-folder", BASE}
    assert "evaluated smollm2-json in" in server.log.read_text()
    assert {model.id for model in server.client.models.list()} == {BASE, *RIGHT}


def test_a_team_has_its_own_variants_and_usage(server: Server) -> None:
    team = openai.OpenAI(base_url=f"{server.url}/v1", api_key=token_of("team"), max_retries=0)
    assert [model.id for model in team.models.list()] == ["smollm2-json"]
    for variant in ("upper-folder", BASE):
        with pytest.raises(openai.PermissionDeniedError, match="the key of team may not use"):
            answer(team, variant, QUESTIONS[1])

    def used() -> list[float]:
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        families = ("requests", "prompt_tokens", "generated_tokens", "engine_seconds")
        found = [samples_of(text, f"peanut_usage_{family}") for family in families]
        own = {"variant": "smollm2-json", "tenant": "team"}
        return [sum(value for labels, value in samples if labels == own) for samples in found]

    before = used()
    ask: Any = partial(
        team.chat.completions.create,
        model="smollm2-json", messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_tokens=16,
    )  # fmt: skip
    told = [ask().usage, [*ask(stream=True, stream_options={"include_usage": True})][-1].usage]
    requests, prompt, generated, seconds = (now - was for now, was in zip(used(), before, strict=True))
    assert (requests, prompt) == (2, sum(one.prompt_tokens for one in told))
    assert generated == sum(one.completion_tokens for one in told) > 0
    assert seconds > 0
    stored = server.client.responses.create(model="smollm2-json", input="hello", max_output_tokens=4)
    with pytest.raises(openai.PermissionDeniedError, match="which is for a key of --api-key"):
        team.responses.retrieve(stored.id)
    with pytest.raises(openai.PermissionDeniedError, match="may not use previous_response_id"):
        team.responses.create(model="smollm2-json", input="go on", previous_response_id=stored.id)


def test_the_console_asks_both_side_by_side(server: Server) -> None:
    """Over the server's own route, with its key, and with what the headers of the answers say."""
    port = (server.log.parent / "admin-port").read_text()
    body = {"prompt": QUESTIONS[1], "variants": list(RIGHT), "max_tokens": 16}
    with logged_in(f"http://127.0.0.1:{port}", "secret") as browser:
        answer = browser.post("/console/playground", json=body, timeout=120)
        found = [json.loads(line) for line in answer.text.splitlines()]
        sections = browser.get("/console/live").json()
    for of, (name, text) in enumerate(RIGHT.items()):
        start, *_, end = [one for one in found if one["of"] == of and one["event"] != "diff"]
        assert "".join(one["text"] for one in found if one["of"] == of and one["event"] == "text") == text
        assert (start["path"], start["digest"]) == ("merged" if of else "LoRA", say(server, name)[1])
        assert 0 < end["first_seconds"] <= end["seconds"]
    assert "→ upper-folder" in sections["swaps"]
    assert "%" in sections["memory"].split("KV cache in use")[1]  # vLLM's own gauge


def test_gateways_see_slots_beside_the_base(server: Server) -> None:
    """And none beside swapped weights, with which no adapter can be answered."""
    say(server, "upper-folder")
    endpoint = read_endpoint(httpx.get(f"{server.url}/metrics", timeout=60).text)
    assert (endpoint.active, endpoint.most) == ({"upper-folder"}, 1)
    assert endpoint.score("smollm2-json") == 0.0
    say(server, "smollm2-json")
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    endpoint = read_endpoint(text)
    assert (endpoint.active, endpoint.waiting, endpoint.most) == ({BASE, "smollm2-json"}, set(), 2)
    assert endpoint.score("upper-folder") == 0.0
    check_families(text, "auto", {BASE, *RIGHT})
    assert all(samples_of(text, name) for name in metric_specs().values())  # what the picker is told to read


def test_salted_prefixes_stay_cached_and_separate(server: Server) -> None:
    """A variant that is swapped in again finds its own prefix in the cache, and only that."""
    prompt = " ".join(QUESTIONS * 8)
    cold: dict[str, str] = {}
    for variant in (BASE, "upper-folder", BASE, "upper-folder"):
        found = server.client.completions.create(model=variant, prompt=prompt, temperature=0, max_tokens=16)
        cached = found.usage.prompt_tokens_details.cached_tokens or 0
        assert (cached >= 128) == (variant in cold), (variant, cached)
        assert cold.setdefault(variant, found.choices[0].text) == found.choices[0].text
    salted = server.client.completions.create(
        model=BASE, prompt=prompt, temperature=0, max_tokens=16, extra_body={"cache_salt": "mine"}
    )
    assert not salted.usage.prompt_tokens_details.cached_tokens  # the client's own salt counts too


def test_the_api_key_is_checked_first(server: Server) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0)
    before = swaps(server)
    for variant in RIGHT:
        with pytest.raises(openai.AuthenticationError):
            answer(stranger, variant, QUESTIONS[1])
    assert swaps(server) == before


def test_what_a_name_means_if_it_is_served_as_lora(server: Server) -> None:
    """Versions, rollback, aliases and removal: the catalogue decides, and vLLM asks nobody else."""
    roots = server.log.parent / "variants"
    shutil.copytree(ADAPTERS / "smollm2-json", roots / "task")
    old = say(server, "task")
    assert old[0] == RIGHT["smollm2-json"]
    shutil.copytree(ADAPTERS / "smollm2-upper", roots / ".new")
    (roots / "task").rename(roots / ".old")
    (roots / ".new").rename(roots / "task")
    new = say(server, "task")
    assert new[0] == RIGHT["upper-folder"]
    assert new[1] != old[1]
    assert admin(server, "POST", "/task/rollback").json()["digest"] == old[1]
    assert say(server, "task") == old
    assert admin(server, "POST", "", {"name": "alias", "source": "smollm2-json"}).status_code == 201
    assert say(server, "alias") == old  # the same θ
    assert admin(server, "DELETE", "/task").status_code == 204
    with pytest.raises(openai.NotFoundError):
        say(server, "task")
    roots_of = {card.id: card.root for card in server.client.models.list()}
    assert roots_of.pop(BASE).endswith(BASE)
    assert roots_of == {**{name: name for name in RIGHT}, "alias": "smollm2-json"}
    assert admin(server, "DELETE", "/alias").status_code == 204


@pytest.mark.parametrize("variant", RIGHT)
def test_invocations_answers_with_the_variant_that_is_named(server: Server, variant: str) -> None:
    body = {"messages": [{"role": "user", "content": QUESTIONS[1]}], "temperature": 0, "max_tokens": 16}
    header = {"X-Amzn-SageMaker-Adapter-Identifier": variant}
    key = {"Authorization": "Bearer none"}
    for named, headers in (({"model": variant}, key), ({}, {**key, **header})):
        found = httpx.post(f"{server.url}/invocations", json={**body, **named}, headers=headers, timeout=120)
        assert found.json()["choices"][0]["message"]["content"] == RIGHT[variant]
        assert (found.json()["model"], found.headers["x-peanut-variant"]) == (variant, variant)
    other = next(name for name in RIGHT if name != variant)
    found = httpx.post(f"{server.url}/invocations", json={**body, "model": other}, headers={**key, **header})
    assert found.status_code == 400


def test_work_does_not_outlive_its_request(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="background is set"):
        server.client.responses.create(model="smollm2-json", input=QUESTIONS[1], background=True)
    found = server.client.responses.create(model="smollm2-json", input=QUESTIONS[1], temperature=0)
    assert found.output_text.startswith(RIGHT["smollm2-json"])


def test_every_route_of_the_running_app_needs_the_key(server: Server) -> None:
    """But those that are open; and none of them is a route that is not known."""
    described = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert len(described) > 20
    for path, methods in described.items():
        assert is_known(path), path
        for method in methods:
            found = httpx.request(method, f"{server.url}{path.replace('{response_id}', 'x')}", json={}, timeout=60)
            is_open = access_to(path) is Access.OPEN
            assert (found.status_code == 401) != is_open, (method, path, found.status_code)


def test_a_client_that_does_not_read_holds_up_no_swap(server: Server) -> None:
    body = json.dumps(
        {"model": "upper-folder", "prompt": QUESTIONS[1], "max_tokens": 900, "stream": True, "n": 8, "temperature": 1,
         "ignore_eos": True, "logprobs": 20}
    ).encode()  # fmt: skip
    with stalled_reader(server, "/v1/completions", body) as stalled:
        assert stalled.recv(20).startswith(b"HTTP/1.1 200")
        until_full(stalled)
        found = server.client.with_options(timeout=60).completions.create(
            model=BASE, prompt=QUESTIONS[1], temperature=0, max_tokens=8
        )
        assert found.model == BASE
        with urllib.request.urlopen(f"{server.url}/ready", timeout=30) as ready:
            assert json.loads(ready.read())["state"] == "serving"


def until_full(reader: socket.socket) -> None:
    """Wait until nothing more arrives in the socket, which the client does not read."""
    before = -1
    while (waiting := struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"    "))[0]) != before:
        before = waiting
        time.sleep(2)


def test_routes_that_need_no_weights_know_the_names(server: Server) -> None:
    before = swaps(server)
    for name, status in ((BASE, 200), ("smollm2-json", 200), ("upper-folder", 200), ("none", 404)):
        body = {"model": name, "messages": [{"role": "user", "content": QUESTIONS[1]}]}
        found = httpx.post(f"{server.url}/tokenize", json=body, headers={"Authorization": "Bearer none"}, timeout=60)
        assert found.status_code == status, found.text
    assert swaps(server) == before


def test_beam_search_runs_in_its_request(server: Server) -> None:
    """It starts tasks of its own, which use the engine as the request may."""
    found = server.client.completions.create(
        model="smollm2-json", prompt=QUESTIONS[1], max_tokens=4, n=2, extra_body={"use_beam_search": True}
    )
    assert len(found.choices) == 2


def test_releases_of_both_kinds(server: Server) -> None:
    """Two LoRA versions share the requests of a name; then a merged one takes it, and gives it back."""
    folder = server.log.parent / "variants"
    message = [{"role": "user", "content": QUESTIONS[1]}]
    shutil.copytree(ADAPTERS / "smollm2-upper", folder / "upper-lora")
    for name in ("upper-lora", "upper-folder"):
        canary = {"messages": message, "contains": [RIGHT["upper-folder"]], "ends": True, "max_tokens": 16}
        (folder / name / "canary.json").write_text(json.dumps({"prompts": [canary]}))
    old = say(server, "smollm2-json")[1]

    def release(verb: str, **body: object) -> dict[str, object]:
        port = (server.log.parent / "admin-port").read_text()
        url = f"http://127.0.0.1:{port}/admin/v1/releases/smollm2-json/{verb}"
        answer = httpx.post(url, json=body, headers={"Authorization": "Bearer secret"}, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def ask(user: str) -> tuple[str, str, str]:
        raw = await server.async_client.chat.completions.with_raw_response.create(
            model="smollm2-json", messages=message, temperature=0, max_tokens=16, user=user
        )
        answer = raw.parse()
        assert answer.model == "smollm2-json"
        return raw.headers["x-peanut-variant"], raw.headers["x-peanut-digest"], str(answer.choices[0].message.content)

    async def ask_all() -> set[tuple[str, str, str]]:
        return set(await asyncio.gather(*(ask(f"user-{number}") for number in range(16))))

    before = ("smollm2-json", old, RIGHT["smollm2-json"])
    staged = release("stage", source="upper-lora")
    assert (staged["passed"], staged["canary"][0]["answer"]) == (True, RIGHT["upper-folder"])
    release("weight", weight=50)
    after = ("smollm2-json@staged", staged["digest"], RIGHT["upper-folder"])
    assert asyncio.run(ask_all()) == {before, after}
    assert say(server, "smollm2-json@staged") == (after[2], after[1])
    release("rollback")
    merged = release("stage", source="upper-folder")["digest"]
    assert merged == say(server, "upper-folder")[1] != staged["digest"]
    release("promote")
    assert asyncio.run(ask_all()) == {("smollm2-json", merged, RIGHT["upper-folder"])}
    release("rollback", reason="that was a test")
    assert asyncio.run(ask_all()) == {before}


def refused(base: Path, folder: Path, *options: str) -> str:
    """The output of a `peanut-serve` that fails to start."""
    (folder / "variants").mkdir(exist_ok=True)
    command = [
        PROGRAM,
        "--base",
        base,
        "--adapters",
        folder / "variants",
        "--state",
        folder / "state",
        "--mode",
        "merged",
    ]
    done = subprocess.run(
        [*map(str, command), "--port", str(free_port()), "--enforce-eager", "--max-model-len", "128", *options],
        capture_output=True,
        text=True,
        env=environment(folder),
        timeout=300,
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr.splitlines()[-1]


def test_a_mixture_of_experts_is_refused(tmp_path: Path, smollm2: Path) -> None:
    """vLLM 0.32 reloads one wrongly on the CPU, without an error."""
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=49152,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for file in smollm2.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, tmp_path / "base")
    assert "peanut-serve: the engine's answer differs" in refused(tmp_path / "base", tmp_path)


def test_embeddings_of_adapters(smollm2: Path, tmp_path: Path) -> None:
    """LoRA mode needs no canary: each adapter gives its own embeddings, and the headers say whose they are."""
    options = ("--runner", "pooling", "--convert", "embed", "--dtype", "float32", "--max-model-len", "256")
    with serving(smollm2, ADAPTERS, tmp_path, *options, "--enforce-eager") as server:
        found = {}
        for name in (BASE, "smollm2-json", "smollm2-upper", "smollm2-json"):
            raw = server.client.embeddings.with_raw_response.create(
                model=name, input=QUESTIONS[1], encoding_format="float"
            )
            assert raw.headers["x-peanut-variant"] == name
            vector = raw.parse().data[0].embedding
            assert found.setdefault(name, vector) == pytest.approx(vector, abs=1e-5)
        assert all(found[a] != pytest.approx(found[b], abs=1e-3) for a, b in combinations(found, 2))
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        tokens = dict(re.findall(r'peanut_tokens_total{kind="prompt",variant="(.*)"} (.*)', text))
        assert float(tokens["smollm2-json"]) == 2 * float(tokens["smollm2-upper"]) > 0
