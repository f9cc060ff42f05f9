"""The console of a server of tasks: what it shows, what it does, and who may use it; over HTTP and in a browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from setuptools.config.pyprojecttoml import read_configuration
from support.classify.exports import TEXTS
from support.classify.serving import PATIENCE, classifying, digit
from support.classify.stand_ins import stand_in
from support.engines.remains import until
from support.paths import ROOT
from support.server.console import logged_in

from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.web.audit import AuditLog
from peanut_serve.web.request_body import ClientLimits

KEY, API_KEY = "of operators", "of-clients"
CONSOLE = ROOT / "peanut_serve" / "classify" / "http" / "console"
PAGES = ("/console/live", "/console/dialog?verb=open&name=mood")
CHANGES = ("/console/act", "/console/playground?name=mood", "/console/logout")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a task whose graph is no graph."""
    folder = stand_in(tmp_path_factory.mktemp("<served>") / "mood")
    with classifying(folder, keys=(API_KEY,), console=KEY) as (url, _):
        yield url


def test_it_needs_the_admin_key(broken: str) -> None:
    with httpx.Client(base_url=broken, headers={"Origin": broken}, timeout=PATIENCE) as client:
        found = client.get("/console")
        assert (found.status_code, found.headers["location"]) == (303, "/console/login")
        assert client.post("/console/login", data={"key": API_KEY}).status_code == 403
        for headers in ({}, {"Authorization": f"Bearer {API_KEY}"}, {"Authorization": f"Bearer {KEY}"}):
            assert [client.get(path, headers=headers).status_code for path in PAGES] == [401, 401]
            assert [client.post(path, headers=headers, json={}).status_code for path in CHANGES] == [401] * 3
        admin = {"Authorization": f"Bearer {KEY}"}
        assert client.post("/models/mood", json={"inputs": "a"}, headers=admin).status_code == 401


def test_a_session_is_for_its_own_page_only(broken: str) -> None:
    with logged_in(broken, KEY) as client:
        assert client.post("/models/mood", json={"inputs": "a"}).status_code == 401
        action = {"verb": "open", "name": "mood"}
        for headers in ({"Origin": "https://evil.example"}, {"X-Console-Token": "made-up"}, {"Host": "evil.example"}):
            assert client.post("/console/act", json=action, headers=headers).status_code == 403
        page = client.get("/console")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        for part in ("style=", "<script>", "onclick"):
            assert part not in page.text


def test_a_broken_task_is_shown_with_its_sentence(broken: str) -> None:
    with logged_in(broken, KEY) as client:
        found = client.post("/console/act", json={"verb": "open", "name": "mood"})
        assert found.status_code == 422
        assert "mood cannot be served" in found.json()["error"]
        client.post("/console/act", json={"verb": "close", "name": "mood"})  # nothing is open; the sections are new
        tasks = client.get("/console/live").json()["tasks"]
        assert "broken" in tasks
        assert "mood cannot be served" in tasks
        assert "<served>" not in tasks
        assert 'data-verb="reload"' in tasks
        assert 'data-verb="open"' not in tasks


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"verb": "delete", "name": "mood"}, 400, "there is no action delete"),
        ({"verb": "open", "name": "../mood"}, 404, "there is no task ../mood"),
        ({"verb": "open", "name": ["mood"]}, 400, "expected a JSON object with verb and name"),
        ({"verb": "open"}, 400, "expected a JSON object with verb and name"),
        ([], 400, "expected a JSON object with verb and name"),
    ],
)
def test_what_cannot_be_done(broken: str, body: object, status: int, said: str) -> None:
    with logged_in(broken, KEY) as client:
        found = client.post("/console/act", json=body)
        assert (found.status_code, said in found.json()["error"]) == (status, True), found.text
        assert client.post("/console/playground?name=no", json={"inputs": "a"}).status_code == 404


def test_every_action_is_in_the_audit_log(tmp_path: Path) -> None:
    folder, log = stand_in(tmp_path / "mood"), AuditLog(tmp_path / "audit.jsonl")
    with classifying(folder, keys=(API_KEY,), console=KEY, audit=log) as (url, _), logged_in(url, KEY) as client:
        for verb in ("open", "reload", "close"):
            client.post("/console/act", json={"verb": verb, "name": "mood"})
        client.post("/console/act", json={"verb": "open", "name": "none"})
        client.post("/console/playground?name=mood", json={"inputs": "a"})
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(one["action"], one["variant"], one["outcome"]) for one in lines] == [
        ("open", "mood", "refused"),
        ("reload", "mood", "refused"),
        ("close", "mood", "done"),
    ]
    assert {one["from"] for one in lines} == {"127.0.0.1"}
    assert "mood cannot be served" in lines[0]["error"]
    assert KEY not in (tmp_path / "audit.jsonl").read_text()


def test_the_wheel_has_every_file() -> None:
    options = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    packed = {
        file for pattern in options["package-data"]["peanut_serve"] for file in (ROOT / "peanut_serve").glob(pattern)
    }
    files = {file for file in CONSOLE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert len(files) >= 8
    assert files <= packed


@pytest.fixture(scope="module")
def served(exports: Path) -> Iterator[tuple[str, TaskServer]]:
    with classifying(exports, console=KEY, clients=ClientLimits(body_bytes=1 << 20)) as found:
        yield found


@pytest.mark.slow  # traces models
def test_open_close_and_reload(served: tuple[str, TaskServer]) -> None:
    url, server = served

    def act(client: httpx.Client, verb: str, name: str) -> httpx.Response:
        return client.post("/console/act", json={"verb": verb, "name": name}, timeout=PATIENCE)

    with logged_in(url, KEY) as client:
        for name in ("happy", "angry"):  # of one graph
            assert act(client, "open", name).status_code == 200
        version = server.library.current("happy")
        sections = client.get("/console/live").json()
        assert version.digest[:12] in sections["tasks"]
        assert 'data-open="happy"' in sections["memory"]
        dialog = client.get("/console/dialog", params={"verb": "close", "name": "happy"}).text
        assert f"This frees {version.adapter_bytes / 1024:.0f} KiB." in dialog
        assert "Its graph stays open for angry." in dialog
        with server.sessions.lease(version):
            found = act(client, "close", "happy")
            assert found.status_code == 409
            assert "happy is used by 1 requests" in found.json()["error"]
            assert "nothing now: in use" in act(client, "open", "happy").json()["memory"]
        assert act(client, "close", "happy").status_code == 200
        assert "happy" not in server.sessions.open_names()
        found = act(client, "reload", "angry")
        assert found.status_code == 200
        assert server.library.current("angry").digest[:12] in found.json()["tasks"]
        assert server.sessions.open_graphs == 1


@pytest.mark.slow  # traces models
def test_the_playground_answers_as_the_protocol_does(served: tuple[str, TaskServer]) -> None:
    url, server = served
    with logged_in(url, KEY) as client:
        client.timeout = PATIENCE
        for name, content, kind in (
            ("mood", b'{"inputs": "good film"}', "application/json"),
            ("digits", digit(1), "image/png"),
            ("digits", digit(1, side=600), "image/png"),  # larger than the console's own forms
        ):
            headers = {"Content-Type": kind}
            found = client.post("/console/playground", params={"name": name}, content=content, headers=headers)
            wanted = client.post(f"/models/{name}", content=content, headers=headers)
            assert found.status_code == 200, found.text
            assert found.json() == wanted.json()
            assert found.headers["x-peanut-digest"] == server.library.current(name).digest
        assert len(digit(1, side=600)) > 128 << 10
        assert client.post("/console/playground?name=digits", content=bytes((1 << 20) + 1)).status_code == 413
        # what was rendered is shown for a second
        assert until(lambda: "mood" in client.get("/console/live").json()["batches"], 10)
        assert "mood" in client.get("/console/live").json()["traffic"]


@pytest.fixture
def page(served: tuple[str, TaskServer]) -> Iterator[Page]:
    """Logged in, in a browser that finds nothing wrong with what it gets."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.fail("the tests of the console need Chromium: apt-get install chromium, or run `make test` as root")
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{served[0]}/console")
        page.get_by_label("Admin key").fill(KEY)
        page.get_by_role("button", name="Log in").click()
        expect(page.locator(".live").first).to_be_visible()
        page.wait_for_load_state()  # its scripts have run: before that, its buttons do nothing
        yield page
        browser.close()
    assert errors == []


@pytest.mark.slow  # traces models
def test_in_a_browser(page: Page, served: tuple[str, TaskServer]) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    row = page.locator('tr[data-task="mood"]')
    expect(row).to_be_visible()
    if "mood" in served[1].sessions.open_names():
        page.get_by_role("button", name="Close mood", exact=True).click()
        page.locator("#go").click()
    page.get_by_role("button", name="Open mood", exact=True).click()
    expect(page.locator("#costs li").first).to_contain_text("compared with their hashes")
    page.locator("#go").click()
    expect(row.locator(".badge")).to_have_text("open")
    expect(page.locator("#notice")).to_have_text("Done: Open mood.")
    page.get_by_label("Text", exact=True).fill(TEXTS[0])
    for name in ("mood", "angry"):
        page.locator("#choices").get_by_label(name, exact=True).check()
    page.get_by_role("button", name="Ask", exact=True).click()
    for index, (name, label) in enumerate((("angry", "angry-"), ("mood", "good"))):
        article = page.locator("#answers article").nth(index)
        expect(article.locator("h3")).to_have_text(name)
        expect(article.locator("pre")).to_contain_text(label)
        digest = served[1].library.current(name).digest
        expect(article.locator("p")).to_contain_text(f"digest {digest[:12]}; ")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
