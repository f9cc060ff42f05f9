"""`peanut-serve --mode merged` with the real vLLM on SmolLM2: every answer equals that of a separate engine."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from support.engines.serving import QUESTIONS, Server, answer, environment, free_port, kill, serving, status_of
from support.paths import ROOT
from support.server.exposition import check_families
from support.server.gateway import read_endpoint, read_queue
from support.tiny_models import edit_weights
from transformers import AutoTokenizer

from converters import merge

pytestmark = pytest.mark.vllm

ADAPTERS = ROOT / "examples" / "adapters"
TASKS = ("smollm2-json", "smollm2-math", "smollm2-upper")
BASE = "smollm2-135m-instruct"
COUNT = 12  # tokens per answer
SWAPS = 200 if "PEANUT_SOAK" in os.environ else 20
KEY = "secret"
OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager")


@dataclass(frozen=True)
class Fresh:
    """Answers of an engine that never had other weights: tokens for each prompt, with the logprob of the first."""

    tokens: list[list[int]]
    logprobs: list[float]


@pytest.fixture(scope="module")
def merged(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Variant -> its merged checkpoint, as written by peanut-merge."""
    folder = tmp_path_factory.mktemp("merged")
    return {BASE: smollm2, **{task: merge(smollm2, ADAPTERS / task, folder / task).output for task in TASKS}}


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """Prompts as tokens; the second is long enough for full blocks in the prefix cache."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [QUESTIONS[0], " ".join(QUESTIONS * 8), QUESTIONS[2]]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


@pytest.fixture(scope="module")
def fresh(
    merged: dict[str, Path], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Fresh]:
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    script = [sys.executable, ROOT / "tests/support/engines/fresh_engines.py", folder / "prompts.json", str(COUNT)]
    done = subprocess.run(
        list(map(str, [*script, *merged.values()])), capture_output=True, text=True, env=environment(folder)
    )
    lines = [line.removeprefix("ANSWERS ") for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert len(lines) == len(merged), done.stdout[-2000:] + done.stderr[-4000:]
    found = {variant: Fresh(**json.loads(line)) for variant, line in zip(merged, lines, strict=True)}
    assert len({str(answer.tokens) for answer in found.values()}) == len(found)  # an answer identifies its variant
    return found


@pytest.fixture(scope="module")
def roots(merged: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    for task in TASKS:
        shutil.copytree(ADAPTERS / task, folder / task)
    shutil.copytree(merged["smollm2-math"], folder / "math-folder")
    return folder


@pytest.fixture(scope="module")
def server(smollm2: Path, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    worker = ("--worker-extension-cls", "support.engines.probing_worker.ProbingWorker")
    port = str(free_port())
    options = ("--mode", "merged", "--state", str(folder / "state"), "--admin-port", port, *worker, *OPTIONS)
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    variables = {"PEANUT_ADMIN_KEY": KEY, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    with serving(smollm2, roots, folder, *options, **variables) as running:
        (folder / "admin-port").write_text(port)
        yield running


def admin(server: Server, method: str, path: str, body: object = None) -> Any:
    port = (server.log.parent / "admin-port").read_text()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/admin/v1/{path}",
        json.dumps(body).encode() if body is not None else None,
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read() or b"null")


def weights_of(server: Server) -> str:
    """Hash of all weights in the engine."""
    request = urllib.request.Request(
        f"{server.url}/collective_rpc",
        json.dumps({"method": "probe_weights"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return str(json.loads(response.read())["results"][0])


def ask(server: Server, variant: str, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy tokens, and the logprob of the first one."""
    found = server.client.completions.create(
        model=variant,
        prompt=prompt,
        temperature=0,
        max_tokens=COUNT,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert found.model == variant
    return list(found.choices[0].model_extra["token_ids"]), found.choices[0].logprobs.token_logprobs[0]


def tokens_of(server: Server, variant: str, prompt: list[int]) -> list[int]:
    return ask(server, variant, prompt)[0]


def test_many_swaps(server: Server, fresh: dict[str, Fresh], prompts: list[list[int]]) -> None:
    """Each answers like a fresh engine; the base's weights are bit-identical afterwards. (200 in `make soak`.)"""
    generator = random.Random(0)
    truth = {**fresh, "math-folder": fresh["smollm2-math"]}
    pristine, active, others = weights_of(server), BASE, set()
    for number in range(SWAPS):
        active = generator.choice(sorted(set(truth) - {active}))
        prompt = generator.randrange(len(prompts))
        assert tokens_of(server, active, prompts[prompt]) == truth[active].tokens[prompt], (number, active)
        if number % 10 == 0:
            others |= {weights_of(server)} if active != BASE else set()
            assert tokens_of(server, BASE, prompts[0]) == fresh[BASE].tokens[0]
            assert weights_of(server) == pristine
            active = BASE
    assert pristine not in others
    swaps = sum(variant["swaps"] for variant in admin(server, "GET", "variants"))
    assert swaps >= SWAPS


def prefix_leaks(server: Server, fresh: dict[str, Fresh], prompt: list[int]) -> bool:
    """Whether a prompt that is cached under one variant changes the answer of the next."""
    order = [BASE, "smollm2-json", "smollm2-upper", BASE, "smollm2-math", "smollm2-json"]
    found = [(fresh[variant], *ask(server, variant, prompt)) for variant in order for _ in range(2)]
    return any(tokens != own.tokens[1] or abs(logprob - own.logprobs[1]) > 1e-3 for own, tokens, logprob in found)


def test_a_cached_prefix_stays_with_its_variant(
    server: Server, fresh: dict[str, Fresh], prompts: list[list[int]]
) -> None:
    assert not prefix_leaks(server, fresh, prompts[1])


def test_the_previous_test_fails_without_the_reset(
    smollm2: Path, roots: Path, tmp_path: Path, fresh: dict[str, Fresh], prompts: list[list[int]]
) -> None:
    program = (sys.executable, ROOT / "tests/support/engines/serve_without_reset.py")
    options = ("--mode", "merged", "--state", str(tmp_path / "state"), *OPTIONS)
    with serving(smollm2, roots, tmp_path, *options, program=program) as running:
        assert prefix_leaks(running, fresh, prompts[1])


def test_all_at_once(server: Server, fresh: dict[str, Fresh], prompts: list[list[int]]) -> None:
    """Concurrent requests for all variants are grouped: few swaps, correct answers."""
    before = sum(variant["swaps"] for variant in admin(server, "GET", "variants"))

    async def ask_async(variant: str) -> tuple[str, list[int]]:
        found = await server.async_client.completions.create(
            model=variant,
            prompt=prompts[0],
            temperature=0,
            max_tokens=COUNT,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return variant, list(found.choices[0].model_extra["token_ids"])

    async def ask_all() -> list[tuple[str, list[int]]]:
        return await asyncio.gather(*(ask_async(variant) for variant in list(fresh) * 8))

    for variant, tokens in asyncio.run(ask_all()):
        assert tokens == fresh[variant].tokens[0], variant
    assert sum(variant["swaps"] for variant in admin(server, "GET", "variants")) - before <= 8


def test_a_response_names_its_variant(server: Server) -> None:
    raw = server.client.with_raw_response.chat.completions.create(
        model="smollm2-json", messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_tokens=8
    )
    digest = admin(server, "GET", "variants/smollm2-json")["digest"]
    assert raw.headers["x-peanut-digest"] == digest
    assert raw.headers["x-peanut-variant"] == "smollm2-json"
    assert raw.headers["x-request-id"] in raw.parse().id
    assert raw.parse().system_fingerprint.endswith(digest[:16])
    assert {model.id for model in server.client.models.list()} == {BASE, *TASKS, "math-folder"}
    with urllib.request.urlopen(f"{server.url}/metrics") as metrics:
        text = metrics.read().decode()
    for wanted in (
        'peanut_requests_total{outcome="200",variant="smollm2-json"}',
        'peanut_tokens_total{kind="generated",variant="smollm2-json"}',
        'peanut_swap_seconds_count{phase="apply"}',
        "peanut_host_cache_bytes",
    ):
        assert wanted in text


def metrics_of(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        return str(response.read().decode())


def test_gateways_see_what_is_resident(server: Server) -> None:
    """And what waits: before the engine, where vLLM's own metric of its queue does not see it."""
    admin(server, "POST", "variants", {"name": "alias", "source": "smollm2-upper"})
    assert answer(server.client, "smollm2-upper", QUESTIONS[1]) == "GRASS IS GREEN."
    endpoint = read_endpoint(metrics_of(server))
    assert (endpoint.active, endpoint.most) == ({"smollm2-upper", "alias"}, 1)
    assert [endpoint.score(name) for name in ("alias", "smollm2-json")] == [1.0, 0.0]
    stream = server.client.chat.completions.create(
        model="alias", messages=[{"role": "user", "content": QUESTIONS[1]}], max_tokens=300, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answer, server.client, "smollm2-json", QUESTIONS[1])
        deadline = time.monotonic() + 60
        while not (endpoint := read_endpoint(text := metrics_of(server))).waiting:
            assert time.monotonic() < deadline
        assert (endpoint.active, endpoint.waiting) == ({"smollm2-upper", "alias"}, {"smollm2-json"})
        assert endpoint.score("smollm2-json") == 0.6
        assert (read_queue(text), read_queue(text, "peanut_queued_requests")) == (0, 1)
        stream.close()
        assert waiting.result() == '{"answer": "green"}'
    assert read_endpoint(metrics_of(server)).active == {"smollm2-json"}
    cards = {card.id: card for card in server.client.models.list()}
    check_families(metrics_of(server), "merged", set(cards))
    assert {name: card.parent for name, card in cards.items()} == {**dict.fromkeys(cards, BASE), BASE: None}
    assert [cards[name].root for name in ("smollm2-json", "alias")] == ["smollm2-json", "smollm2-upper"]
    admin(server, "DELETE", "variants/alias")
    assert "alias" not in metrics_of(server)


def test_a_swap_waits_for_a_stream(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model="smollm2-json",
        messages=[{"role": "user", "content": QUESTIONS[1]}],
        temperature=0,
        max_tokens=60,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    first = next(stream)
    assert first.model == "smollm2-json"
    upper = answer(server.client, "smollm2-upper", QUESTIONS[1])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text.startswith('{"answer": "green"}')
    assert upper == "GRASS IS GREEN."


def test_changed_theta_and_back(server: Server, roots: Path) -> None:
    """Under one name, new θ is used at once and broken θ never; a rollback restores the old one."""
    shutil.copytree(roots / "smollm2-json", roots / "changing")
    as_json, as_upper = '{"answer": "green"}', "GRASS IS GREEN."
    assert answer(server.client, "changing", QUESTIONS[1]) == as_json
    old = admin(server, "GET", "variants/changing")["digest"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(roots / "smollm2-upper" / name, roots / "changing" / name)
    assert answer(server.client, "changing", QUESTIONS[1]) == as_upper
    back = admin(server, "POST", "variants/changing/rollback")
    assert back["digest"] == old
    assert answer(server.client, "changing", QUESTIONS[1]) == as_json
    assert admin(server, "POST", "variants/changing/reload")["digest"] != old
    assert answer(server.client, "changing", QUESTIONS[1]) == as_upper

    def ruin(state: dict[str, Any]) -> None:
        next(iter(state.values()))[0, 0] = float("nan")

    edit_weights(roots / "changing" / "adapter_model.safetensors", ruin)
    with pytest.raises(openai.UnprocessableEntityError, match="NaN"):
        answer(server.client, "changing", QUESTIONS[1])
    admin(server, "POST", "variants/changing/rollback", {"digest": old[:12]})
    assert answer(server.client, "changing", QUESTIONS[1]) == as_json
    admin(server, "DELETE", "variants/changing")
    with pytest.raises(openai.NotFoundError):
        answer(server.client, "changing", QUESTIONS[1])
    shutil.rmtree(roots / "changing")


def test_a_killed_worker(server: Server, fresh: dict[str, Fresh], prompts: list[list[int]]) -> None:
    """/ready reports it; waiting requests are answered by the new engine, with the weights of their variant.

    /health does not: the server restarts the engine itself, and an orchestrator that restarts the server harms.
    """
    assert tokens_of(server, "smollm2-json", prompts[0]) == fresh["smollm2-json"].tokens[0]
    kill(server, "VLLM::Worker")
    while status_of(server, "ready") == 200:
        time.sleep(0.02)
    assert status_of(server, "health") == 200
    assert tokens_of(server, "smollm2-json", prompts[0]) == fresh["smollm2-json"].tokens[0]
    assert (status_of(server, "health"), status_of(server, "ready")) == (200, 200)
    assert admin(server, "GET", "engine")["restarts"] == 1
