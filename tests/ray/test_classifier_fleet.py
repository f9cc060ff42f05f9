"""Classifiers on a real Ray Serve cluster: tasks that betray themselves, batches, what clients see of losses."""

import asyncio
import base64
import copy
import io
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from support.engines.remains import until
from support.fleet.classifier_tasks import TASKS, image_tasks, text_task
from support.onnx_models import LABELS
from support.server.tenants import entry, token_of, write_keys

from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.ray.child import free_port
from peanut_serve.ray.classifiers.settings import ClassifierSettings
from peanut_serve.ray.declaration import declaration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY, REPLICAS, MOST_BYTES = "a-key", 2, 100_000
RATES = [f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")]
TEXTS = ["good film", "bad film", "film", "good good good bad"]


class Fleet:
    def __init__(self, config: dict[str, Any], images: list[bytes], wanted: dict[str, list[list[Any]]]) -> None:
        self.config, self.images, self.wanted = config, images, wanted
        self.address = f"http://127.0.0.1:{config['http_options']['port']}"
        self.headers = {"Authorization": f"Bearer {KEY}"}

    def client(self, model: str) -> huggingface_hub.InferenceClient:
        return huggingface_hub.InferenceClient(model=f"{self.address}/models/{model}", token=KEY, timeout=60)

    def post(self, model: str, content: bytes, kind: str = "", key: str = KEY) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": kind}
        return httpx.post(f"{self.address}/models/{model}", content=content, headers=headers, timeout=60)

    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.address}/replicas", headers=self.headers, timeout=60).json()
        return found

    def ask_all(self, count: int) -> list[tuple[str, int, httpx.Response]]:
        """So many requests at once, each for the next task, with the task and the number of its input."""

        async def ask(client: httpx.AsyncClient, number: int) -> tuple[str, int, httpx.Response]:
            task, index = TASKS[number % len(TASKS)], number % len(self.images)
            answer = await client.post(f"/models/{task}", content=self.images[index])
            return task, index, answer

        async def ask_together() -> list[tuple[str, int, httpx.Response]]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=self.address, headers=self.headers, timeout=60, limits=limits
            ) as client:
                return await asyncio.gather(*(ask(client, number) for number in range(count)))

        return asyncio.run(ask_together())

    def is_right(self, task: str, index: int, found: list[dict[str, Any]]) -> bool:
        wanted = self.wanted[task][index]
        return [one["label"] for one in found] == [one.label for one in wanted] and bool(
            np.allclose([one["score"] for one in found], [one.score for one in wanted], atol=1e-4)
        )

    def apply(self, config: dict[str, Any]) -> None:
        """Until Serve says that the fleet runs."""
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
        assert until(lambda: serve.status().applications["peanut-serve"].status == "RUNNING", 200)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("classifiers")
    (folder / "keys").write_text(KEY)
    folders = (image_tasks(folder), text_task(folder))
    rng = np.random.default_rng(0)
    images = []
    for _ in range(6):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 16, (16, 16), np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    engine = OnnxEngine(folders[0], threads=1)
    wanted: dict[str, list[list[Any]]] = {task: list(engine.predict(images, task)) for task in TASKS}
    wanted["sentiment"] = list(OnnxEngine(folders[1], threads=1).predict(TEXTS))
    scores = {tuple(round(one.score, 3) for one in wanted[task][0]) for task in TASKS}
    assert len(scores) == len(TASKS), "the tasks do not betray themselves"
    entries = [
        entry("one", variants=["first", "nobody"], requests_per_minute=30),
        entry("eye", role="read-only"),
        entry("narrow", places=1),
    ]
    settings = ClassifierSettings(
        folders=folders, replicas=REPLICAS, cpus=0.1, key_file=folder / "keys", most_bytes=MOST_BYTES,
        keys=write_keys(folder / "keys.json", *entries),
    )  # fmt: skip
    os.environ |= {"RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        fleet = Fleet(declaration(settings, "127.0.0.1", free_port()), images, wanted)
        serve.start(http_options=fleet.config["http_options"], logging_config={"log_level": "ERROR"})
        fleet.apply(fleet.config)
        yield fleet
    finally:
        serve.shutdown()
        ray.shutdown()


def test_clients_of_hugging_face_get_their_answers(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it is asked for every address
    for task in TASKS:
        raw = fleet.client(task).image_classification(fleet.images[0])
        assert fleet.is_right(task, 0, [{"label": one.label, "score": one.score} for one in raw])
        (best,) = fleet.client(task).image_classification(fleet.images[1], top_k=1)
        assert best.label == fleet.wanted[task][1][0].label
    for text, wanted in zip(TEXTS, fleet.wanted["sentiment"], strict=True):
        found = fleet.client("sentiment").text_classification(text)
        assert [one.label for one in found] == [one.label for one in wanted]
        assert [one.score for one in found] == pytest.approx([one.score for one in wanted], abs=1e-5)


def test_a_task_stays_where_it_is_loaded(fleet: Fleet) -> None:
    before = {one["replica"]: inputs(one) for one in fleet.replicas()}
    for _ in range(5):
        for task in TASKS:
            assert fleet.post(task, fleet.images[0]).status_code == 200
    grown = Counter[str]()
    for one in fleet.replicas():
        grown.update((inputs(one) - before[one["replica"]]).keys())
    assert grown == Counter(TASKS), "a task was asked at two replicas"


def test_many_requests_at_once_are_batched_by_task(fleet: Fleet) -> None:
    before = totals(fleet)
    answers = fleet.ask_all(160)
    assert {answer.status_code for *_, answer in answers} == {200}
    assert all(fleet.is_right(task, index, answer.json()) for task, index, answer in answers)
    asked, batches = (after - then for after, then in zip(totals(fleet), before, strict=True))
    assert asked == 160
    assert batches < 140, "requests were run one by one"


def inputs(replica: dict[str, Any]) -> Counter[str]:
    """Of each task at a replica."""
    return Counter({task: counts["inputs"] for task, counts in replica["tasks"].items()})


def totals(fleet: Fleet) -> tuple[int, int]:
    """Inputs and batches of all replicas."""
    counts = [count for one in fleet.replicas() for count in one["tasks"].values()]
    return sum(one["inputs"] for one in counts), sum(one["batches"] for one in counts)


def test_a_bad_input_does_not_spoil_its_batch(fleet: Fleet) -> None:
    cut = fleet.images[0][: len(fleet.images[0]) // 2]  # its header is right
    with ThreadPoolExecutor(16) as pool:
        contents = [cut if number % 4 == 0 else fleet.images[1] for number in range(16)]
        answers = list(pool.map(lambda content: fleet.post("first", content), contents))
    for content, answer in zip(contents, answers, strict=True):
        if content == cut:
            assert answer.status_code == 400
            assert "cannot be read as an image" in answer.json()["error"]
        else:
            assert fleet.is_right("first", 1, answer.json())


@pytest.mark.parametrize(
    ("model", "content", "kind", "key", "status"),
    [
        ("first", b"", "", "wrong", 401),
        ("nobody", b"", "", KEY, 404),
        ("../first", b"", "", KEY, 404),
        ("first", b"no image", "", KEY, 400),
        ("first", b'{"inputs": "/etc/hostname"}', "application/json", KEY, 400),
        ("sentiment", b'{"inputs": 1}', "application/json", KEY, 400),
        ("first", b" " * (MOST_BYTES + 1), "", KEY, 413),
        ("sentiment", json.dumps({"inputs": ["a"] * 65}).encode(), "application/json", KEY, 413),
    ],
)
def test_refusals(fleet: Fleet, model: str, content: bytes, kind: str, key: str, status: int) -> None:
    answer = fleet.post(model, content, kind, key)
    assert answer.status_code == status
    assert status == 404 or isinstance(answer.json()["error"], str)


def test_health_and_models(fleet: Fleet) -> None:
    for probe in ("health", "ready"):
        assert httpx.get(f"{fleet.address}/{probe}", timeout=60).status_code == 200
    assert httpx.get(f"{fleet.address}/models", timeout=60).status_code == 401
    models = httpx.get(f"{fleet.address}/models", headers=fleet.headers, timeout=60).json()
    assert {one["id"] for one in models} == {*TASKS, "sentiment"}
    assert models[-1] == {"id": "sentiment", "task": "text-classification", "labels": LABELS}


def rates(answer: httpx.Response) -> list[str]:
    return [name for name, _ in answer.headers.multi_items() if name.startswith("x-ratelimit-")]


def test_teams_have_their_tasks_and_limits(fleet: Fleet) -> None:
    def as_(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token_of(name)}"}

    answer = fleet.post("first", fleet.images[0], key=token_of("one"))
    assert fleet.is_right("first", 0, answer.json())
    assert answer.headers["x-ratelimit-limit-requests"] == "30"
    assert int(answer.headers["x-ratelimit-remaining-requests"]) >= 28
    for model, status in (("second", 403), ("sentiment", 403), ("no such task", 403), ("nobody", 404)):
        refused = fleet.post(model, fleet.images[0], key=token_of("one"))
        assert refused.status_code == status, refused.text
        assert TASKS[1] not in refused.text.replace(model, "")
        assert rates(refused) == RATES, status
    for content, status in ((b"no image", 400), (b" " * (MOST_BYTES + 1), 413)):
        refused = fleet.post("first", content, key=token_of("one"))
        assert (refused.status_code, rates(refused)) == (status, RATES)
    models = httpx.get(f"{fleet.address}/models", headers=as_("one"), timeout=60)
    assert [one["id"] for one in models.json()] == ["first"]
    assert rates(models) == rates(httpx.get(f"{fleet.address}/replicas", headers=as_("one"), timeout=60)) == RATES
    statuses = {
        name: httpx.get(f"{fleet.address}/replicas", headers=as_(name), timeout=60).status_code
        for name in ("one", "eye", "nobody")
    }
    assert statuses == {"one": 403, "eye": 200, "nobody": 401}
    assert fleet.post("first", fleet.images[0], key=token_of("eye")).status_code == 403
    told = Counter(fleet.post("first", fleet.images[0], key=token_of("one")).status_code for _ in range(40))
    assert told[429] > 5
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: fleet.post("first", fleet.images[0], key=token_of("narrow")), range(24)))
    assert {one.status_code for one in answers} == {200, 429}
    page = httpx.get(f"{fleet.address}/metrics", timeout=60).text
    assert 'peanut_usage_requests_total{tenant="one",variant="first"}' in page.replace(
        'variant="first",tenant="one"', 'tenant="one",variant="first"'
    )
    assert 'reason="rate",tenant="one"' in page


def test_a_full_queue_is_told_and_changed_in_place(fleet: Fleet) -> None:
    names = {one["replica"] for one in fleet.replicas()}
    changed = copy.deepcopy(fleet.config)
    changed["applications"][0]["deployments"][0]["user_config"] |= {"most_waiting": 2, "batch_wait": 0.2}
    fleet.apply(changed)
    answers = fleet.ask_all(60)
    told = Counter(answer.status_code for *_, answer in answers)
    assert told.keys() == {200, 429}
    assert all(answer.headers["retry-after"] == "1" for *_, answer in answers if answer.status_code == 429)
    assert all(fleet.is_right(*rest, answer.json()) for *rest, answer in answers if answer.status_code == 200)
    fleet.apply(fleet.config)
    assert {one["replica"] for one in fleet.replicas()} == names, "a replica was restarted"


def test_a_lost_replica_is_replaced(fleet: Fleet) -> None:
    """Under load: every request ends in the right answer or in an error."""
    lost = processes()[0]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fleet.ask_all, 300)
        time.sleep(0.3)
        os.kill(lost, signal.SIGKILL)
        answers = asked.result(120)
    assert len(answers) == 300
    told = Counter(answer.status_code for *_, answer in answers)
    assert told.keys() <= {200, 503}
    assert told[200] > 150
    assert all(fleet.is_right(*rest, answer.json()) for *rest, answer in answers if answer.status_code == 200)
    assert until(lambda: lost not in processes() and len(processes()) == REPLICAS, 60)
    encoded = json.dumps({"inputs": base64.b64encode(fleet.images[2]).decode()}).encode()
    for task in TASKS:
        assert fleet.is_right(task, 2, fleet.post(task, encoded, "application/json").json())


def processes() -> list[int]:
    """The replicas that run."""
    details = ray.get(_get_global_client()._controller.get_serve_instance_details.remote())
    found = details["applications"]["peanut-serve"]["deployments"]["Classifier"]["replicas"]
    return [one["pid"] for one in found if one["state"] == "RUNNING"]
