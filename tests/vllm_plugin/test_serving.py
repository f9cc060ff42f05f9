"""`peanut-serve` with the real vLLM and real adapters on SmolLM2: alone, mixed, and while adapters change."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from support.engines.serving import QUESTIONS, Server, answer, environment, kill, serving, stalled_reader, status_of
from support.paths import ROOT
from support.server.exposition import check_families
from support.server.gateway import read_endpoint, samples_of
from support.tiny_models import edit_json, edit_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import merge, open_checkpoint
from converters.adapters.loading import load_adapter
from converters.inspection.norms import record_base

pytestmark = pytest.mark.vllm

ADAPTERS = ROOT / "examples" / "adapters"
TASKS = ("smollm2-json", "smollm2-math", "smollm2-upper")
BASE = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def expected(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[int]]:
    """(task, question) -> greedy tokens of the merged checkpoint in transformers, in float32."""
    folder = tmp_path_factory.mktemp("merged")
    found = {}
    for task in (BASE, *TASKS):
        model_folder = smollm2
        if task != BASE:
            model_folder = merge(smollm2, ADAPTERS / task, folder / task, dtype="fp32").output
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        for question in QUESTIONS:
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
            found[task, question] = tokens[0, prompt["input_ids"].shape[1] :].tolist()
    return found


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        shutil.copytree(ADAPTERS / task, folder / task)
    return folder


@pytest.fixture(scope="module")
def server(smollm2: Path, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--dtype", "float32", "--max-model-len", "1024")
    with serving(smollm2, roots, tmp_path_factory.mktemp("server"), *options) as running:
        yield running


async def tokens_of(client: openai.AsyncOpenAI, task: str, question: str) -> list[int]:
    found = await client.chat.completions.create(
        model=task,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        extra_body={"return_token_ids": True},
    )
    return list(found.choices[0].model_extra["token_ids"])


def test_all_at_once_evaluates_each_adapter_once(server: Server, expected: dict[tuple[str, str], list[int]]) -> None:
    """The first requests for every task, base among them, in one batch: greedy tokens are the merged checkpoints'."""

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(server.async_client, *pair) for pair in list(expected) * 3))

    for pair, tokens in zip(list(expected) * 3, asyncio.run(ask_all()), strict=True):
        assert tokens == expected[pair], pair
    log = server.log.read_text()
    for task in TASKS:
        assert log.count(f"evaluated {task} in") == 1


def test_each_alone(server: Server, expected: dict[tuple[str, str], list[int]]) -> None:
    for pair, tokens in expected.items():
        assert asyncio.run(tokens_of(server.async_client, *pair)) == tokens, pair
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)  # an answer identifies its task


def test_what_is_listed(server: Server) -> None:
    assert {model.id for model in server.client.models.list()} >= {BASE, *TASKS}


def test_a_response_names_its_variant(server: Server) -> None:
    raw = server.client.with_raw_response.chat.completions.create(
        model="smollm2-json", messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_tokens=8
    )
    digest = raw.headers["x-peanut-digest"]
    assert (raw.headers["x-peanut-variant"], raw.parse().model) == ("smollm2-json", "smollm2-json")
    assert raw.parse().system_fingerprint.endswith(digest[:16])
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as metrics:
        assert b'peanut_tokens_total{kind="generated",variant="smollm2-json"}' in metrics.read()


def test_gateways_see_the_adapters(server: Server) -> None:
    """By their public names, in one sample: those that run, and those that are loaded."""
    for task in TASKS:
        assert answer(server.client, task, QUESTIONS[1], 1)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    assert len(samples_of(text, "vllm:lora_requests_info")) == 1
    endpoint = read_endpoint(text)
    assert (endpoint.active, endpoint.waiting, endpoint.most) == (set(TASKS), set(), len(TASKS))
    assert [endpoint.score(name) for name in ("smollm2-json", "other")] == [1.0, 0.0]
    cards = {card.id: (card.root, card.parent) for card in server.client.models.list()}
    check_families(text, "lora", set(cards))
    assert cards["smollm2-json"] == ("smollm2-json", BASE)
    assert cards[BASE][1] is None
    with urllib.request.urlopen(f"{server.url}/health", timeout=60) as health:
        assert json.loads(health.read()) == {"state": "serving", "detail": None}


def test_the_rest_of_vllm_is_unchanged(server: Server) -> None:
    chunks = server.client.chat.completions.create(
        model="smollm2-json",
        messages=[{"role": "user", "content": QUESTIONS[1]}],
        temperature=0,
        max_tokens=16,
        stream=True,
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).startswith('{"answer"')
    with urllib.request.urlopen(f"{server.url}/metrics") as metrics:
        assert b"vllm:lora_requests_info" in metrics.read()
    # prompt_logprobs with lm_head among the LoRA modules would crash the engine
    assert answer(server.client, "smollm2-json", QUESTIONS[1], extra_body={"prompt_logprobs": 1})


def test_nothing_loads_a_path_that_a_client_names(server: Server, roots: Path) -> None:
    body = json.dumps({"lora_name": "mine", "lora_path": str(roots)}).encode()
    request = urllib.request.Request(f"{server.url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(request)
    for name in ("../tasks/smollm2-json", str(roots / "smollm2-json"), "smollm2-json/", ".", "nobody", "a\nb"):
        with pytest.raises(openai.NotFoundError):
            answer(server.client, name, QUESTIONS[0])


def test_a_replaced_adapter_is_used_at_once(server: Server, roots: Path) -> None:
    """With the same name and prompt, neither old weights nor the old KV cache are used."""
    shutil.copytree(roots / "smollm2-json", roots / "changing")
    question = " ".join([QUESTIONS[1]] * 20)  # long enough for full blocks in the prefix cache
    as_json = answer(server.client, "smollm2-json", question)
    as_upper = answer(server.client, "smollm2-upper", question)
    assert as_json != as_upper
    for other, wanted in (("smollm2-upper", as_upper), ("smollm2-json", as_json)) * 2:
        assert answer(server.client, "changing", question) != wanted
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(roots / other / name, roots / "changing" / name)
        assert answer(server.client, "changing", question) == wanted
    shutil.rmtree(roots / "changing")
    with pytest.raises(openai.NotFoundError, match="changing"):
        answer(server.client, "changing", question)
    assert "changing" not in {model.id for model in server.client.models.list()}


def test_two_versions_in_one_batch(server: Server, roots: Path) -> None:
    """A running request keeps its version, in a batch with the new version; others take their slots."""
    shutil.copytree(roots / "smollm2-json", roots / "flying")
    old, new = (answer(server.client, task, QUESTIONS[1], 16) for task in ("smollm2-json", "smollm2-upper"))
    assert old != new
    streams = [flying(server)]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(roots / "smollm2-upper" / name, roots / "flying" / name)
    streams.append(flying(server))
    assert answer(server.client, "smollm2-math", QUESTIONS[2]) == "4 + 5 = 9. The answer is 9"
    assert answer(server.client, "smollm2-json", QUESTIONS[1], 16) == old
    with urllib.request.urlopen(f"{server.url}/metrics") as metrics:
        running = re.search(rb"vllm:num_requests_running{.*} (.*)", metrics.read())
    assert float(running[1]) == 2  # they were running all the time
    for stream, wanted in zip(streams, (old, new), strict=True):
        assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices).startswith(wanted)
    shutil.rmtree(roots / "flying")


def flying(server: Server) -> Iterator[Any]:
    """Start streaming a long answer."""
    stream = server.client.chat.completions.create(
        model="flying",
        messages=[{"role": "user", "content": QUESTIONS[1]}],
        temperature=0,
        max_tokens=300,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return chain([next(stream)], stream)


def refused(server: Server, roots: Path, name: str) -> str:
    """The reason why an adapter is not served; the server stays alive."""
    with pytest.raises(openai.UnprocessableEntityError) as error:
        answer(server.client, name, QUESTIONS[1])
    shutil.rmtree(roots / name)
    assert answer(server.client, "smollm2-json", QUESTIONS[1]).startswith('{"answer"')
    return str(error.value)


def test_a_broken_adapter_never_answers(server: Server, roots: Path, tmp_path: Path, smollm2: Path) -> None:
    for name in ("truncated", "nan", "mixed", "large", "other-base", "lm-head"):
        shutil.copytree(roots / "smollm2-upper", roots / name)
    weights = roots / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "not a whole safetensors file" in refused(server, roots, "truncated")

    def first_nan(state: dict[str, torch.Tensor]) -> None:
        next(iter(state.values()))[0, 0] = float("nan")

    edit_weights(roots / "nan" / "adapter_model.safetensors", first_nan)
    assert "contains 1 NaN or Inf" in refused(server, roots, "nan")
    edit_json(roots / "mixed" / "adapter_config.json", r=16)
    assert "peanut_A has shape (8, 576), expected (16, 576)" in refused(server, roots, "mixed")
    other = tmp_path / "other"
    shutil.copytree(smollm2, other)
    edit_weights(other / "model.safetensors", lambda state: state["model.norm.weight"].mul_(1.5))
    record_base(load_adapter(roots / "other-base"), open_checkpoint(other))
    assert "was recorded on a base with fingerprint" in refused(server, roots, "other-base")

    def wide(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: torch.ones(*(64 if size == 8 else size for size in v.shape)) for k, v in state.items()}

    edit_weights(roots / "large" / "adapter_model.safetensors", wide)
    edit_json(roots / "large" / "adapter_config.json", r=64)
    assert "its rank is 64, but vLLM runs with --max-lora-rank 32" in refused(server, roots, "large")

    def of_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        at = "base_model.model.lm_head.peanut_"
        layers = {f"{at}{part}.{i}.weight": torch.eye(8) for part in ("encoders", "decoders") for i in range(1)}
        return {f"{at}A.weight": torch.ones(8, 49152), f"{at}B.weight": torch.ones(49152, 8), **layers}

    edit_weights(roots / "lm-head" / "adapter_model.safetensors", of_head)
    edit_json(roots / "lm-head" / "adapter_config.json", target_modules=["lm_head"])
    assert "it updates lm_head, which vLLM's --lora-target-modules does not include" in refused(
        server, roots, "lm-head"
    )


def test_cancelled_requests_leave_nothing(server: Server) -> None:
    async def cancel_some() -> None:
        client = server.async_client
        tasks = [asyncio.create_task(tokens_of(client, TASKS[i % 3], QUESTIONS[i % 3])) for i in range(12)]
        await asyncio.sleep(0.3)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(found, list) for found in done[1::2])

    asyncio.run(cancel_some())
    assert answer(server.client, "smollm2-math", QUESTIONS[2]) == "4 + 5 = 9. The answer is 9"


def test_the_online_example(server: Server) -> None:
    script = ROOT / "examples" / "online_tasks.py"
    done = subprocess.run([sys.executable, script, server.url], capture_output=True, text=True)
    assert 'smollm2-json: {"answer": "' in done.stdout, done.stderr
    assert "smollm2-math: 4 + 5 = 9. The answer is 9" in done.stdout


def test_the_offline_example(smollm2: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "offline_batch.py"
    done = subprocess.run(
        [sys.executable, script, smollm2, ADAPTERS], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert 'smollm2-json: {"answer": "' in done.stdout, done.stderr[-2000:]
    assert "smollm2-math: 4 + 5 = 9. The answer is 9" in done.stdout


def test_the_readme(smollm2: Path, tmp_path: Path) -> None:
    """Its two commands, with a different port."""
    serve, curl, _ = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    command = shlex.split(serve)
    assert command[:2] == ["peanut-serve", "--base"]
    assert (ROOT / command[2]).samefile(smollm2)
    with serving(Path(command[2]), Path(command[4]), tmp_path, *command[5:]) as running:
        done = subprocess.run(
            curl.replace("http://127.0.0.1:8000", running.url), shell=True, capture_output=True, text=True
        )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == '{"answer": "green"}', done.stderr


def test_an_engine_that_is_killed_is_restarted(server: Server) -> None:
    """The server goes on, and is alive but not ready meanwhile; the new engine gets the adapters again."""
    before = answer(server.client, "smollm2-json", QUESTIONS[1])
    kill(server, "VLLM::EngineCore")
    deadline = time.monotonic() + 200
    while status_of(server, "ready") == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert status_of(server, "health") == 200
    while True:
        try:
            assert answer(server.client, "smollm2-json", QUESTIONS[1]) == before
            break
        except openai.InternalServerError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as metrics:
        assert b"peanut_engine_restarts_total 1.0" in metrics.read()
    assert (status_of(server, "health"), status_of(server, "ready")) == (200, 200)


def test_it_stops_on_sigterm(server: Server) -> None:
    """Runs last. A client that does not read its response gets half a minute, as all running requests do."""
    body = json.dumps({"model": "smollm2-json", "prompt": QUESTIONS[1], "max_tokens": 900, "stream": True, "n": 8,
                       "ignore_eos": True, "logprobs": 5}).encode()  # fmt: skip
    with stalled_reader(server, "/v1/completions", body) as stalled:
        assert stalled.recv(20).startswith(b"HTTP/1.1 200")
        server.process.terminate()
        assert server.process.wait(90) == 0
