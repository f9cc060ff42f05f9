"""Fleets for the benchmark, their engines one by one, and requests that come whether or not the last was answered."""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
from make_inputs import make_adapter
from serving import BASE

from peanut_serve.ray.child import free_port
from peanut_serve.ray.one_machine import VARIABLES
from peanut_serve.ray.settings import FleetSettings

WORK = Path(__file__).parent.parent / "build" / "bench" / "fleet"
VARIANTS = tuple(f"variant-{number}" for number in range(8))
PATIENCE = 900.0  # seconds for a fleet to come up, or to answer
PROMPT, NEW = 16, 8  # tokens
ENGINE = (
    "--mode", "merged", "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16",
    "--host-cache", "3GiB", "--served-model-name", "base",
)  # fmt: skip


def make_variants() -> Path:
    """The folder of random adapters, which are made if they are not there."""
    for name in VARIANTS:
        make_adapter(BASE, WORK / "adapters" / name, 8)
    return WORK / "adapters"


@dataclass(frozen=True)
class Engine:
    """The server of a replica, asked without the fleet."""

    url: str
    key: str

    @property
    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False)

    def swaps(self) -> float:
        """How many it has made."""
        with self.client as client:
            text = client.get("/metrics").raise_for_status().text
        return sum(map(float, re.findall(r"^peanut_swaps_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)))

    def preload(self) -> None:
        """Let it evaluate every variant, so that a swap is a copy from then on."""
        with self.client as client:
            for name in [*VARIANTS, *VARIANTS[:1]]:
                client.post("/v1/completions", json=_body(name, [1000] * PROMPT)).raise_for_status()

    def swap_seconds(self) -> float:
        """The median of a swap and one token, less one token."""
        with self.client as client:
            times = []
            for name in [*VARIANTS[1:], *VARIANTS]:
                first, again = (_timed(client, {**_body(name, [1000] * PROMPT), "max_tokens": 1}) for _ in range(2))
                times.append(first - again)
        return sorted(times)[len(times) // 2]


@contextmanager
def fleet(replicas: int, routing: Mapping[str, Any]) -> Iterator[tuple[str, list[Engine]]]:
    """A fleet on this machine; its URL and its engines.

    Args:
        replicas: how many engines, each with one thread.
        routing: settings of Ray's `RequestRouterConfig`.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    from peanut_serve.ray.app import application

    port, options = free_port(), ["--base", str(BASE), "--adapters", str(make_variants()), *ENGINE]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    settings = FleetSettings.model_validate(
        {"engine": {"options": options, "variables": variables}, "replicas": replicas, "logs": WORK / "logs"}
    )
    ray.init("local", num_cpus=max(replicas, 2), include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
        serve.run(application(settings, routing))
        engines = _engines()
        for engine in engines:
            engine.preload()
        yield f"http://127.0.0.1:{port}", engines
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _engines() -> list[Engine]:
    """What runs with this benchmark's logs: addresses and keys stand in their command lines and environments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            variables = dict(line.partition("=")[::2] for line in (folder / "environ").read_text().split("\0"))
        except (OSError, UnicodeDecodeError):
            continue
        if "--state" in words and str(WORK) in words[words.index("--state") + 1] and "-m" not in words:
            found.append(Engine(f"http://127.0.0.1:{words[words.index('--port') + 1]}", variables["VLLM_API_KEY"]))
    return found


def _body(name: str, prompt: Sequence[int]) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}


def _timed(client: httpx.Client, body: dict[str, Any]) -> float:
    start = time.perf_counter()
    client.post("/v1/completions", json=body).raise_for_status()
    return time.perf_counter() - start


def zipf(rate: float, seconds: float, exponent: float, seed: int) -> list[tuple[float, dict[str, Any]]]:
    """Requests and when they come: at random moments, `rate` a second, and for variants by Zipf's law."""
    dice, now, requests = random.Random(seed), 0.0, []
    weights = list(accumulate(1 / place**exponent for place in range(1, len(VARIANTS) + 1)))
    while (now := now + dice.expovariate(rate)) < seconds:
        name = dice.choices(VARIANTS, cum_weights=weights)[0]
        requests.append((now, _body(name, [dice.randrange(1000, 31000) for _ in range(PROMPT)])))
    return requests


def latencies(url: str, requests: Sequence[tuple[float, dict[str, Any]]]) -> list[float]:
    """Send each request at its moment; seconds from that moment to its answer. Raises if one is refused."""
    return asyncio.run(_latencies(url, requests))


async def _latencies(url: str, requests: Sequence[tuple[float, dict[str, Any]]]) -> list[float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as client:
        start = time.perf_counter()

        async def ask(at: float, body: dict[str, Any]) -> float:
            await asyncio.sleep(start + at - time.perf_counter())
            (await client.post("/v1/completions", json=body)).raise_for_status()
            return time.perf_counter() - start - at

        return await asyncio.gather(*(ask(at, body) for at, body in requests))


@dataclass(frozen=True)
class Turn:
    """Seconds of one request: until the headers or the first event, and between two events of a stream."""

    first: float
    token: float


def one_stream(client: httpx.Client, tokens: int) -> Turn:
    """A request whose tokens come one by one."""
    body = {**_body(VARIANTS[0], [1000] * PROMPT), "max_tokens": tokens, "stream": True}
    start, events = time.perf_counter(), list[float]()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                assert "error" not in json.loads(line.removeprefix("data: "))
                events.append(time.perf_counter())
    return Turn(events[0] - start, (events[-1] - events[0]) / (len(events) - 1))


def one_request(client: httpx.Client) -> float:
    """Seconds of the smallest request there is, for weights that are there."""
    return _timed(client, {**_body(VARIANTS[0], [1000] * PROMPT), "max_tokens": 1})
