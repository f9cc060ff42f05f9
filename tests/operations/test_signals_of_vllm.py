"""What a real server tells of itself, from one start: JSON logs, spans over gRPC, TLS at the admin port, limits."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support.engines.remains import until
from support.engines.serving import Server, answer, free_port, serving
from support.paths import ROOT
from support.server.certificates import self_signed
from support.server.otlp import Received, grpc_receiver
from support.server.tenants import entry, token_of, write_keys

from peanut_serve.settings.tls import Certificate
from peanut_serve.tenants.keys import new_token

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ADMIN_KEY = "an-admin-key-that-nobody-may-read"
MISPLACED = new_token()  # a key that a client puts into the URL
# a line as uvicorn or vLLM writes it by default
LOGGED = re.compile(r"(?:\(.*\) )?(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")


@dataclass(frozen=True)
class Told:
    """A server with everything turned on."""

    server: Server
    admin: str
    certificate: Certificate
    spans: Received

    def curl(self, path: str, *options: str, key: str = ADMIN_KEY) -> tuple[int, str]:
        """The exit code of curl, and what it printed: the body and the status."""
        command = ["curl", "--silent", "--show-error", "--max-time", "120", "--write-out", " %{http_code}", *options]
        header = ["--header", f"Authorization: Bearer {key}"]
        done = subprocess.run([*command, *header, f"{self.admin}{path}"], capture_output=True, text=True, timeout=180)
        return done.returncode, done.stdout + done.stderr

    def trusting(self, path: str, *options: str, key: str = ADMIN_KEY) -> tuple[int, str]:
        return self.curl(path, "--cacert", str(self.certificate.certfile), *options, key=key)

    def post(self, path: str, **body: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token_of('team')}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        return httpx.post(f"{self.server.url}{path}", json=body, headers=headers, timeout=300)

    def lines(self) -> tuple[list[dict[str, object]], list[str]]:
        """The log: objects, and lines that are none."""
        found, others = [], []
        for line in self.server.log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                others.append(line)
        return found, others


@pytest.fixture(scope="module")
def told(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder = tmp_path_factory.mktemp("told")
    certificate, port = self_signed(folder / "tls"), free_port()
    keys = write_keys(folder / "keys.json", entry("team", requests_per_minute=600), entry("boss", role="admin"))
    options = {
        "--dtype": "float32",
        "--max-model-len": "256",
        "--mode": "merged",
        "--log-format": "json",
        "--keys": keys,
        "--admin-port": port,
        "--admin-ssl-certfile": certificate.certfile,
        "--admin-ssl-keyfile": certificate.keyfile,
    }
    variables = {"PEANUT_ADMIN_KEY": ADMIN_KEY, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}
    with grpc_receiver() as spans:
        given = [str(part) for pair in options.items() for part in pair]
        given += ["--otlp-traces-endpoint", spans.endpoint]
        with serving(smollm2, ROOT / "examples" / "adapters", folder, *given, **variables) as server:
            yield Told(server, f"https://127.0.0.1:{port}", certificate, spans)


def test_the_admin_port_speaks_tls_only(told: Told) -> None:
    code, printed = told.trusting("/admin/v1/engine")
    assert (code, printed[-3:]) == (0, "200"), printed
    assert json.loads(printed[:-4])["state"] == "serving"
    assert told.trusting("/admin/v1/engine", key="wrong")[1][-3:] == "401"
    assert told.trusting("/admin/v1/engine", key=token_of("team"))[1][-3:] == "403"
    assert told.trusting("/admin/v1/variants", key=token_of("boss"))[1][-3:] == "200"
    assert told.curl("/admin/v1/engine")[0] == 60, "a certificate that nobody has signed is trusted"
    in_clear = subprocess.run(
        ["curl", "--silent", "--max-time", "20", f"{told.admin.replace('https', 'http')}/healthz"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert in_clear.returncode != 0


def test_spans_of_queue_swap_and_engine_are_one_story(told: Told) -> None:
    body = {"model": "smollm2-json", "prompt": "What color is grass?", "max_tokens": 4}
    assert told.post("/v1/completions", **body).status_code == 200
    wanted = ("peanut.request", "peanut.queue", "peanut.swap", "llm_request")
    assert until(lambda: all(told.spans.named(name) for name in wanted), 60), {one.name for one in told.spans.spans}
    (request,) = [one for one in told.spans.named("peanut.request") if one.trace_id.hex() == TRACE]
    assert request.parent_span_id.hex() == PARENT
    for name in ("peanut.queue", "llm_request"):
        (child,) = [one for one in told.spans.named(name) if one.trace_id.hex() == TRACE]
        assert child.parent_span_id == request.span_id, name
    swap = told.spans.named("peanut.swap")[-1]
    assert swap.trace_id.hex() != TRACE
    phases = {one.name for one in told.spans.spans if one.parent_span_id == swap.span_id}
    assert {"peanut.swap.apply", "peanut.swap.check"} <= phases


def test_what_a_team_may_send_is_in_the_headers(told: Told) -> None:
    found = told.post("/v1/completions", model="smollm2-json", prompt="a", max_tokens=1)
    assert found.headers["x-ratelimit-limit-requests"] == "600"
    assert int(found.headers["x-ratelimit-remaining-requests"]) > 500
    assert found.headers["x-ratelimit-reset-requests"].endswith("s")


def test_both_names_of_a_release_are_known_on_every_route(told: Told) -> None:
    stage = ("--request", "POST", "--header", "Content-Type: application/json", "--data")
    assert told.post("/tokenize", model="smollm2-math@current", prompt="a").status_code == 404
    code, printed = told.trusting("/admin/v1/releases/smollm2-math/stage", *stage, '{"source": "smollm2-upper"}')
    assert (code, printed[-3:]) == (0, "200"), printed
    chat = [{"role": "user", "content": "a"}]
    for name in ("smollm2-math", "smollm2-math@current", "smollm2-math@staged"):
        tokens = told.post("/tokenize", model=name, prompt="a b").json()["tokens"]
        assert told.post("/detokenize", model=name, tokens=tokens).json()["prompt"] == "a b", name
        for path, body in (
            ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": chat, "max_tokens": 1}),
            ("/v1/messages/count_tokens", {"messages": chat}),
        ):
            assert told.post(path, model=name, **body).status_code == 200, (path, name)
    assert told.trusting("/admin/v1/releases/smollm2-math/rollback", *stage, "{}")[1][-3:] == "200"


def test_each_line_of_the_log_is_an_object_without_a_key(told: Told) -> None:
    client = told.server.client.with_options(api_key=token_of("team"))
    answer(client, "smollm2-json", "What color is grass?", 4)
    wrong = httpx.get(f"{told.server.url}/v1/models?api_key={MISPLACED}", timeout=60)
    assert wrong.status_code == 401
    assert until(lambda: "api_key=***" in told.server.log.read_text(), 30)
    found, others = told.lines()
    assert {one["process"] for one in found} >= {"APIServer", "EngineCore"}
    assert {str(one["logger"]).partition(".")[0] for one in found} >= {"vllm", "uvicorn"}
    swap = next(one for one in found if str(one["message"]).startswith("swap variant=smollm2-json"))
    assert (swap["variant"], len(str(swap["digest"])), swap["logger"]) == ("smollm2-json", 12, "vllm.peanut_serve")
    # what libraries print themselves is not logged
    assert [line for line in others if LOGGED.match(line)] == []
    text = told.server.log.read_text()
    assert not any(key in text for key in (ADMIN_KEY, MISPLACED, token_of("team"), token_of("boss")))
