"""A fleet on a real Ray Serve cluster, with fake engines: what clients see of residency, losses and refusals."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve
from support.engines.process_tree import parent_of
from support.engines.remains import until
from support.fleet import fake_server
from support.server.gateway import samples_of
from support.server.tenants import entry, token_of, write_keys

from peanut_serve.ray.app import build
from peanut_serve.ray.child import free_port
from peanut_serve.ray.one_machine import VARIABLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY, ADMIN_KEY = "a-key", "an-admin-key"
REPLICAS = 3
COMPLETIONS = "/v1/completions"
QUEUES_KNOWN = 1  # seconds for which Ray remembers the length of a queue; its default is 10


class Fleet:
    def __init__(self, address: str, journal: Path) -> None:
        self.client = httpx.Client(base_url=address, timeout=60, headers={"Authorization": f"Bearer {KEY}"})
        self.address, self.journal = address, journal

    def ask(self, variant: str) -> tuple[str, int]:
        """Who answered: variant and process."""
        answer = self.client.post(COMPLETIONS, json={"model": variant})
        assert answer.status_code == 200, answer.text
        return answer.json()["variant"], answer.json()["pid"]

    def operate(self, method: str, path: str, key: str = ADMIN_KEY) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.request(method, f"{self.address}/admin/v1{path}", headers=headers, timeout=60)

    def events(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    journal, keys, port = folder / "journal", folder / "keys", free_port()
    keys.write_text(f"{KEY}\nanother-key\n")
    os.environ |= VARIABLES | {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
    os.environ["RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S"] = str(QUEUES_KNOWN)
    engine = {
        "command": [sys.executable, fake_server.__file__],
        "options": ["--swap", "0.2", "--journal", str(journal)],
    }
    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
        (folder / "admin").write_text(ADMIN_KEY)
        files = {"key_file": str(keys), "admin_key_file": str(folder / "admin"), "logs": str(folder)}
        entries = [entry("one", variants=["v1", "new-*"], places=1), entry("eye", role="read-only")]
        files["keys"] = str(write_keys(folder / "keys.json", *entries))
        serve.run(build({"engine": engine, "replicas": REPLICAS, "cpus": 0.1, **files}))
        yield Fleet(f"http://127.0.0.1:{port}", journal)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_variant_stays_where_its_weights_are(fleet: Fleet) -> None:
    first = {variant: fleet.ask(variant) for variant in ["v0", "v1", "v2"]}
    swaps = len(fleet.events())
    for _ in range(5):
        for variant, answered in first.items():
            assert fleet.ask(variant) == answered
    assert len({pid for _, pid in first.values()}) == REPLICAS
    assert len(fleet.events()) == swaps, "a variant was swapped in again"


def test_a_replica_that_is_slow_keeps_its_variant(fleet: Fleet) -> None:
    answered = fleet.ask("v1")
    replica = parent_of(parent_of(answered[1]))  # the watchdog is between
    time.sleep(2 * QUEUES_KNOWN)
    os.kill(replica, signal.SIGSTOP)
    resumed = threading.Timer(2, os.kill, (replica, signal.SIGCONT))
    resumed.start()
    assert fleet.ask("v1") == answered
    resumed.join()


def test_another_name_of_a_variant_goes_where_its_weights_are(fleet: Fleet) -> None:
    answered = fleet.ask("v0")
    time.sleep(2)  # until the front has been told the names of what is resident
    assert fleet.ask("prod") == answered


def test_requests_and_answers_pass_byte_for_byte(fleet: Fleet) -> None:
    body = '{"model": "v1",  "prompt": "ü\\u0000"}'.encode()
    answer = fleet.client.post("/tokenize?a=1&b=%2F", content=body)
    assert answer.status_code == 418
    assert answer.content == bytes(range(256))
    assert answer.headers["x-body"] == body.hex()
    assert answer.headers["x-query"] == "a=1&b=%2F"
    assert answer.headers["x-odd"] == "a, b;c"
    assert KEY not in answer.headers["x-key"], "engines have keys of their own"
    assert len(answer.headers.get_list("date")) == 1


@pytest.mark.parametrize(
    ("path", "content", "key", "status"),
    [
        (COMPLETIONS, b'{"model": "v0"}', "wrong", 401),
        (COMPLETIONS, b'{"model": "v0"}', "another-key", 200),
        (COMPLETIONS, b"{", KEY, 400),
        (COMPLETIONS, b'{"model": 3}', KEY, 400),
        (COMPLETIONS, b'{"model": "nobody"}', KEY, 404),
        ("/v1/load_lora_adapter", b"{}", KEY, 404),
        ("/no/such/route", b"{}", KEY, 404),
    ],
)
def test_refusals(fleet: Fleet, path: str, content: bytes, key: str, status: int) -> None:
    answer = httpx.post(fleet.address + path, content=content, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"]


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(name)}"}


@pytest.mark.parametrize(
    ("path", "content", "status", "reason"),
    [
        (COMPLETIONS, b'{"model": "v1"}', 200, ""),
        (COMPLETIONS, b'{"model": "v0"}', 403, "the key of one may not use v0"),
        (COMPLETIONS, b"{}", 403, "may not use requests without the name of a variant"),
        ("/tokenize", b'{"model": "v0"}', 403, "may not use v0"),
        ("/invocations", b'{"model": "v0"}', 403, "may not use v0"),
        (COMPLETIONS, b'{"model": "new-1"}', 404, "there is no variant new-1"),
        ("/v1/responses/1/cancel", b"{}", 403, "which is for a key of --api-key"),
        ("/no/such/route", b"{}", 404, "is not served"),
    ],
)
def test_what_a_tenant_may_use(fleet: Fleet, path: str, content: bytes, status: int, reason: str) -> None:
    answer = httpx.post(fleet.address + path, content=content, headers=as_("one"), timeout=60)
    assert answer.status_code == status
    assert status == 200 or reason in answer.json()["error"]["message"]


def test_a_tenant_has_its_places_until_the_end_of_its_answers(fleet: Fleet) -> None:
    body = {"model": "v1", "stream": True, "max_tokens": 40}
    with httpx.stream("POST", fleet.address + COMPLETIONS, json=body, headers=as_("one"), timeout=60) as stream:
        parts = stream.iter_bytes()
        next(parts)
        refused = httpx.post(fleet.address + COMPLETIONS, json={"model": "v1"}, headers=as_("one"), timeout=60)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "one has 1 requests in the server, and may have 1" in refused.json()["error"]["message"]
        assert b"".join(parts).endswith(b"data: [DONE]\n\n")

    def is_answered() -> bool:
        answer = httpx.post(fleet.address + COMPLETIONS, json={"model": "v1"}, headers=as_("one"), timeout=60)
        return answer.status_code == 200

    assert until(is_answered, 10)
    with httpx.stream("POST", fleet.address + COMPLETIONS, json=body, headers=as_("one"), timeout=60) as left:
        next(left.iter_bytes())
    assert until(is_answered, 10), "the place of a client that left was not given back"


def test_engines_are_told_the_tenant_by_the_front_alone(fleet: Fleet) -> None:
    made_up = {"X-Peanut-Tenant": "somebody"}
    for headers, told in ((as_("one"), "one"), ({"Authorization": f"Bearer {KEY}"}, "")):
        answer = httpx.post(f"{fleet.address}/tokenize", json={"model": "v1"}, headers={**headers, **made_up})
        assert answer.headers["x-tenant"] == told


def test_tenants_and_operators_see_what_is_theirs(fleet: Fleet) -> None:
    listed = {
        name: fleet.client.get("/v1/models", headers=headers) for name, headers in (("one", as_("one")), ("all", {}))
    }
    ids = {name: {model["id"] for model in answer.json()["data"]} for name, answer in listed.items()}
    assert ids["one"] == {"v1"}
    assert ids["all"] > {"base", "v0", "v1"}
    assert fleet.operate("GET", "/variants", token_of("eye")).status_code == 200
    refused = fleet.operate("POST", "/variants/v1/pin", token_of("eye"))
    assert (refused.status_code, "is read-only" in refused.json()["error"]["message"]) == (403, True)
    assert fleet.operate("GET", "/variants", token_of("one")).status_code == 403
    assert httpx.post(fleet.address + COMPLETIONS, json={}, headers=as_("eye")).status_code == 403
    (usage,) = fleet.operate("GET", "/usage", token_of("eye")).json()["usage"]
    assert (usage["tenant"], usage["requests"], usage["engine_seconds"]) == ("one", 2 * REPLICAS, 0.5 * REPLICAS)
    time.sleep(1.1)  # for which a page of metrics is used again
    page = httpx.get(f"{fleet.address}/metrics", timeout=60).text
    refusals = [labels for labels, _ in samples_of(page, "peanut_refused_requests")]
    assert {"tenant": "eye", "reason": "role", "replica": "front"} in refusals
    assert ({"replica": "front"}, 1.0) in samples_of(page, "peanut_keys_current")


def test_each_engine_has_a_state_folder_of_its_own(fleet: Fleet) -> None:
    folders = set()
    for pid in living(fleet):
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        folders.add(arguments[arguments.index("--state") + 1])
    assert folders == {str(fleet.journal.parent / "state" / str(number)) for number in range(REPLICAS)}


def test_the_admin_api_has_an_entry_per_replica(fleet: Fleet) -> None:
    pid = fleet.ask("v1")[1]
    found = fleet.operate("GET", "/fleet").json()
    assert (found["agree"], found["disputed"]) == (True, [])
    assert len({one["replica"] for one in found["replicas"]}) == REPLICAS
    assert all(one["digests"] == fake_server.NAMES for one in found["replicas"])
    assert sum(one["engine"]["digest"] == "v1" for one in found["replicas"]) == 1
    assert pid in living(fleet)


def test_a_change_goes_to_all_replicas(fleet: Fleet) -> None:
    answer = fleet.operate("POST", "/variants/v3/reload")
    assert answer.status_code == 200
    assert answer.json()["agree"]
    assert {one["answer"]["pid"] for one in answer.json()["replicas"]} == living(fleet)
    assert {one["answer"]["digest"] for one in answer.json()["replicas"]} == {"v3"}
    assert fleet.operate("DELETE", "/variants/v3?drain=true").status_code == 200


def test_an_activation_goes_to_one_replica(fleet: Fleet) -> None:
    pid = fleet.ask("v1")[1]
    answer = fleet.operate("POST", "/variants/v1/activate")
    assert (answer.status_code, answer.json()["answer"]["pid"]) == (200, pid)
    assert sum("activate v1" in event for event in fleet.events()) == 1


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("GET", "/fleet", KEY, 401),
        ("POST", "/variants/nobody/pin", ADMIN_KEY, 404),
        ("POST", "/variants/v1/steal", ADMIN_KEY, 404),
        ("GET", "/nothing", ADMIN_KEY, 404),
    ],
)
def test_refusals_of_the_admin_api(fleet: Fleet, method: str, path: str, key: str, status: int) -> None:
    assert fleet.operate(method, path, key).status_code == status


def test_a_disagreement_is_told(fleet: Fleet) -> None:
    answer = fleet.operate("POST", "/variants/v9/reload")
    assert (answer.status_code, answer.json()["agree"]) == (207, False)
    found = fleet.operate("GET", "/fleet").json()
    assert (found["agree"], found["disputed"]) == (False, ["v9"])


def test_a_body_that_is_too_large(fleet: Fleet) -> None:
    answer = fleet.client.post(COMPLETIONS, content=b" " * ((64 << 20) + 1))
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "RequestTooLargeError"


def test_a_client_that_goes_away_ends_its_request(fleet: Fleet) -> None:
    body = {"model": "v1", "stream": True, "max_tokens": 10_000}
    with fleet.client.stream("POST", COMPLETIONS, json=body) as answer:
        next(answer.iter_lines())
    assert until(lambda: any("cancelled" in event for event in fleet.events()), 20)


def test_a_lost_engine_is_told_and_replaced(fleet: Fleet) -> None:
    """The stream that it answered ends with an error, the next request is answered by another, the fleet is whole."""
    body = {"model": "v2", "stream": True, "max_tokens": 10_000}
    with fleet.client.stream("POST", COMPLETIONS, json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        lost = int(next(lines).partition('"pid": ')[2].strip("}"))
        os.kill(lost, signal.SIGKILL)
        assert "the replica that answered was lost" in list(lines)[-1]
    for _ in range(10):
        variant, pid = fleet.ask("v2")
        assert variant == "v2"
        assert pid != lost
    assert until(lambda: len(living(fleet) - {lost}) == REPLICAS, 60)


def test_an_answer_that_was_cut_is_given_by_another(fleet: Fleet) -> None:
    """Its status and a part of its body were there already, but had not been passed on."""
    body = {"model": "v5", "stuck": True}
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(fleet.client.post, COMPLETIONS, json=body)
        assert until(lambda: any("stuck" in event for event in fleet.events()), 20)
        lost = int(next(event for event in fleet.events() if "stuck" in event).split()[0])
        os.kill(lost, signal.SIGKILL)
        answer = asking.result(60)
    assert (answer.status_code, answer.json()["variant"]) == (200, "v5")
    assert answer.json()["pid"] != lost
    assert until(lambda: len(living(fleet) - {lost}) == REPLICAS, 60)


def test_a_request_of_an_engine_that_dies_is_answered_by_another(fleet: Fleet) -> None:
    """vLLM's server answers 500 then, and ends."""
    answer = fleet.client.post(COMPLETIONS, json={"model": "v6", "dies": True})
    assert (answer.status_code, answer.json()["variant"]) == (200, "v6")
    died = int(next(event for event in fleet.events() if "died" in event).split()[0])
    assert answer.json()["pid"] != died
    assert until(lambda: died not in living(fleet) and len(living(fleet)) == REPLICAS, 120)


def living(fleet: Fleet) -> set[int]:
    """The engines that run."""
    found = set()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = command.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(fleet.journal).encode() in arguments and b"peanut_serve.ray.watchdog" not in arguments:
            found.add(int(command.parent.name))
    return found
