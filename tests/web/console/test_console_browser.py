"""The console in a real Chromium, in front of a real `VariantServer` and its control; the engine alone is a fake."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright
from support.server.admin import KEY
from support.server.fake_engine import identity
from support.server.rig import Rig, make_weights, rig_runner
from support.server.variant_app import data_route

from peanut_serve.web.admin import admin_app
from peanut_serve.web.connections import bind, serve_on
from peanut_serve.web.console.app import ConsoleHost, add_console
from peanut_serve.web.operator import VariantControl

pytestmark = pytest.mark.slow

SECONDS = 60  # a bound for every wait
expect.set_options(timeout=SECONDS * 1000)


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.fail("the tests of the console need Chromium: apt-get install chromium, or run `make test` as root")
    return found


@dataclass(frozen=True)
class Site:
    """A console, and the loop that its server runs in."""

    url: str
    rig: Rig
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], object]) -> None:
        """Call a function in the loop, and wait for it."""

        async def run() -> None:
            function()

        asyncio.run_coroutine_threadsafe(run(), self.loop).result(SECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # the sandbox needs user namespaces, which containers often forbid; the pages are our own
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("console")
    found: list[Site] = []
    is_up, end = threading.Event(), threading.Event()

    async def serve(rig: Rig) -> None:
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        control = VariantControl(rig.server)
        app = admin_app(control, KEY)
        add_console(app, ConsoleHost(control, KEY, port, route=data_route(rig.server, rig.engine)))
        serving = asyncio.create_task(serve_on(app, listener))
        found.append(Site(f"http://127.0.0.1:{port}", rig, asyncio.get_running_loop()))
        is_up.set()
        while not end.is_set():
            await asyncio.sleep(0.05)
        serving.cancel()
        await asyncio.wait([serving], timeout=10)

    def run() -> None:  # in a thread with a loop of its own: Playwright's is in this one
        weights = make_weights(folder)
        with pytest.MonkeyPatch.context() as patch:
            rig_runner(weights, folder, patch, seconds=600)(serve, max_wait=5)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert is_up.wait(SECONDS)
    yield found[0]
    end.set()
    thread.join(SECONDS)


@dataclass(frozen=True)
class Seen:
    """A page, and what its browser did besides showing it."""

    page: Page
    errors: list[str]
    foreign: list[str]


@pytest.fixture
def seen(browser: Browser, site: Site) -> Iterator[Seen]:
    """A page of a browser that reaches no other host; every test ends with nothing wrong in its console."""
    context = browser.new_context()
    context.set_default_timeout(SECONDS * 1000)
    page, errors, foreign = context.new_page(), list[str](), list[str]()

    def only_here(route: Route, request: Request) -> None:
        if request.url.startswith(f"{site.url}/"):
            route.continue_()
        else:
            foreign.append(request.url)
            route.abort()

    context.route("**/*", only_here)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield Seen(page, errors, foreign)
    context.close()
    assert foreign == []


@pytest.fixture
def page(seen: Seen, site: Site) -> Page:
    """Logged in."""
    log_in(seen.page, site, KEY)
    see_the_console(seen.page)
    return seen.page


def log_in(page: Page, site: Site, key: str) -> None:
    page.goto(f"{site.url}/console")
    page.get_by_label("Admin key").fill(key)
    page.get_by_role("button", name="Log in").click()


def see_the_console(page: Page) -> None:
    """Also its scripts have run: before that, its buttons do nothing."""
    expect(page.locator("#resident")).to_be_visible()
    page.wait_for_load_state()


def act(page: Page, button: str, confirm: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator("#costs li").first).to_be_visible()
    page.locator("#dialog").get_by_role("button", name=confirm, exact=True).click()


def activate(page: Page, name: str) -> None:
    act(page, f"Activate {name}", "Activate")
    expect(page.locator("#resident")).to_have_text(name)
    expect(page.locator("#dialog")).to_be_hidden()


def test_a_wrong_key(seen: Seen, site: Site) -> None:
    log_in(seen.page, site, "wrong")
    expect(seen.page.get_by_role("alert")).to_have_text("This is not an admin key of this server.")
    assert "wrong" not in seen.page.url
    assert seen.page.context.cookies() == []
    seen.page.goto(f"{site.url}/console")
    expect(seen.page).to_have_url(f"{site.url}/console/login")


def test_what_it_shows(page: Page, seen: Seen, site: Site) -> None:
    for name in ("base", "v1", "v2", "v3", "broken"):
        expect(page.locator(f'tr[data-variant="{name}"]')).to_be_visible()
    assert KEY not in page.url
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/console")
    assert page.evaluate("document.cookie") == ""
    assert seen.errors == []


def test_activate_and_ask(page: Page, seen: Seen, site: Site) -> None:
    activate(page, "v1")
    expect(page.locator('tr[data-variant="v1"] .badge').first).to_have_text("active")
    expect(page.locator("#swaps .timeline li").first).to_contain_text("an operator asked for it")
    assert identity(site.rig.engine.weights) == site.rig.expected["v1"]
    page.get_by_label("Prompt").fill("Who are you?")
    for name in ("v1", "v2"):
        page.locator("#choices").get_by_label(name, exact=True).check()
    expect(page.locator("#comparison-cost")).to_contain_text("Comparing merged variants costs swaps: 1 swap here")
    page.get_by_role("button", name="Ask", exact=True).click()
    for index, name in enumerate(("v1", "v2")):
        article = page.locator("#answers article").nth(index)
        expect(article.locator("pre").first).to_have_text(f"Weights {site.rig.expected[name][:8]} speaking.")
        digest = site.rig.server.facts(name).digest
        assert digest is not None
        expect(article.locator("p")).to_contain_text(f"merged, digest {digest[:12]}; first token after ")
    assert site.rig.expected["v1"][:8] in page.locator("#answers article").nth(1).locator("del").all_inner_texts()
    assert seen.errors == []


def test_a_failing_swap(page: Page, site: Site) -> None:
    activate(page, "v1")
    site.call(lambda: site.rig.engine.fail("apply"))
    act(page, "Activate v3", "Activate")
    sentence = "the swap failed and was rolled back: apply failed"
    expect(page.locator("#dialog-error")).to_have_text(sentence)
    page.locator("#dismiss").click()
    first = page.locator("#swaps .timeline li").first
    expect(first).to_contain_text("v1 → v3")
    expect(first).to_contain_text(sentence)
    expect(first).to_contain_text("failed: rolled back")
    expect(page.locator("#variants .error", has_text="v3:")).to_contain_text(sentence)
    expect(page.locator("#resident")).to_have_text("v1")
    activate(page, "v3")  # the failure is over
    assert identity(site.rig.engine.weights) == site.rig.expected["v3"]


def test_reload_and_roll_back(page: Page, site: Site, tmp_path: Path) -> None:
    activate(page, "v2")
    before = site.rig.server.facts("v2").digest
    tasks = Path(site.rig.server.settings.roots[0])
    shutil.copytree(tasks / "v2", tmp_path / "kept")
    shutil.copy(tasks / "v3" / "adapter_model.safetensors", tasks / "v2" / "adapter_model.safetensors")
    try:
        act(page, "Reload v2", "Reload")
        expect(page.locator("#notice")).to_have_text("Done: Reload v2.")
        after = site.rig.server.facts("v2").digest
        assert after != before is not None
        expect(page.locator("#versions")).to_contain_text(f"{before}")
        act(page, f"Roll back v2 to {before[:12]}", "Roll back")
        expect(page.locator("#notice")).to_have_text("Done: Roll back v2.")
        assert site.rig.server.facts("v2").digest == before
    finally:
        shutil.copy(tmp_path / "kept" / "adapter_model.safetensors", tasks / "v2" / "adapter_model.safetensors")


def test_register_pin_and_unregister(page: Page, site: Site) -> None:
    page.get_by_role("button", name="Register a variant").click()
    page.get_by_label("Name that requests will use").fill("new")
    page.get_by_label("Source:").fill("v1")
    page.locator("#go").click()
    row = page.locator('tr[data-variant="new"]')
    expect(row).to_be_visible()
    act(page, "Pin new", "Pin")
    expect(row.locator(".pinned")).to_be_visible()
    act(page, "Unpin new", "Unpin")
    expect(row.locator(".pinned")).to_have_count(0)
    act(page, "Unregister new", "Unregister")
    expect(row).to_have_count(0)
    assert not site.rig.server.has("new")


def test_it_is_live(page: Page, site: Site) -> None:
    """What others do appears by itself."""
    asyncio.run_coroutine_threadsafe(site.rig.server.activate("v2"), site.loop).result(SECONDS)
    expect(page.locator("#resident")).to_have_text("v2")
    asyncio.run_coroutine_threadsafe(site.rig.server.activate("base"), site.loop).result(SECONDS)
    expect(page.locator("#resident")).to_have_text("base")


def test_by_keyboard_alone(seen: Seen, site: Site) -> None:
    page = seen.page
    page.goto(f"{site.url}/console")
    page.keyboard.type(KEY)  # the field has the focus
    page.keyboard.press("Enter")
    see_the_console(page)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the variants")).to_be_focused()
    button = page.locator('[id="pin:v3"]')
    button.focus()
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.name") == "v3"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_in_both_themes(page: Page, scheme: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert (brightness > 382) == (scheme == "light")
    page.get_by_role("button", name="Theme: auto").click()
    page.emulate_media(color_scheme="dark")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light  # remembered
    act(page, "Activate v1", "Close")  # the dialog fits
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_page_elsewhere_can_do_nothing(browser: Browser, site: Site) -> None:
    """A real browser with a session, on a page of another origin: forms, fetches, frames and websockets."""
    context = browser.new_context()
    page = context.new_page()
    log_in(page, site, KEY)
    see_the_console(page)
    swaps = len(site.rig.server.driver.history.latest())
    evil = context.new_page()
    other = site.url.replace("127.0.0.1", "localhost")  # another site; nothing is served to it
    context.route(f"{other}/evil", lambda route: route.fulfill(content_type="text/html", body="<h1>evil</h1>"))
    evil.goto(f"{other}/evil")
    attack = """async (url) => {
        const found = [];
        const note = (promise) => promise.then(
            (answer) => found.push(answer.type + answer.status), () => found.push("refused"));
        const body = JSON.stringify({ verb: "activate", name: "v1" });
        await note(fetch(url + "/console/act", { method: "POST", body, credentials: "include" }));
        await note(fetch(url + "/console/act", { method: "POST", body, credentials: "include", mode: "no-cors" }));
        await note(fetch(url + "/console/live", { credentials: "include" }));
        await new Promise((resolve) => {
            const socket = new WebSocket(url.replace("http", "ws") + "/console/live");
            socket.onopen = () => { found.push("open"); resolve(); };
            socket.onerror = () => { found.push("refused"); resolve(); };
        });
        return found;
    }"""
    assert evil.evaluate(attack, site.url) == ["refused"] * 4
    evil.set_content(f'<iframe src="{site.url}/console"></iframe>')
    evil.wait_for_timeout(500)
    frames = [frame for frame in evil.frames if frame.parent_frame is not None]
    assert all("Resident" not in (frame.content() if "console" in frame.url else "") for frame in frames)
    time.sleep(0.2)
    assert len(site.rig.server.driver.history.latest()) == swaps
    context.close()


def test_logging_out(page: Page, site: Site) -> None:
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(f"{site.url}/console/login")
    page.goto(f"{site.url}/console")
    expect(page).to_have_url(f"{site.url}/console/login")
