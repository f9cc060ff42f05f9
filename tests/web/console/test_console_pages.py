"""What the console shows and does, over HTTP, without a browser."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from datetime import datetime, timezone

import httpx
import pytest
from setuptools.config.pyprojecttoml import read_configuration
from support.paths import ROOT
from support.server.admin import REFUSALS, FakeControl
from support.server.console import Completions, logged_in, serving_console

from peanut_serve.web.console.costs import View, action_cost, comparison_cost, estimate
from peanut_serve.web.console.data_route import DataRoute, Message
from peanut_serve.web.console.live_pages import shown, size
from peanut_serve.web.console.playground import difference
from peanut_serve.web.schema import SwapStatus, VariantState, VariantStatus

CONSOLE = ROOT / "peanut_serve" / "web" / "console"


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def completions() -> Completions:
    return Completions()


@pytest.fixture
def browser(control: FakeControl, completions: Completions) -> Iterator[httpx.Client]:
    with serving_console(control, completions.route) as url, logged_in(url) as client:
        yield client


def test_the_sections(browser: httpx.Client, control: FakeControl) -> None:
    sections = browser.get("/console/live").json()
    assert list(sections) == ["engine", "queue", "variants", "memory", "swaps", "traffic", "versions"]
    for name in control.names:
        assert name in sections["variants"]
        assert name in sections["traffic"]
    assert "a request had waited for --max-wait" in sections["swaps"]
    assert "2 for swap, the oldest for 10.5 s" in sections["swaps"]
    assert "roll back 750 ms" in sections["swaps"]
    assert "d0" * 20 in sections["versions"]
    assert "18.6 GiB" in sections["memory"]
    assert "1.2 s" in sections["traffic"]


def test_text_of_others_is_escaped(browser: httpx.Client, control: FakeControl) -> None:
    control.names.append('<img src=x onerror="alert(1)">')
    found = browser.get("/console").text + "".join(browser.get("/console/live").json().values())
    assert "<img" not in found
    assert "&lt;img src=x" in found
    assert "&lt;out of memory&gt;" in found
    dialog = browser.get("/console/dialog", params={"verb": "pin", "name": control.names[-1]}).text
    assert "<img" not in dialog


def test_nothing_is_fetched_from_elsewhere(browser: httpx.Client) -> None:
    """Every address in the pages and files is the console's own; and no code is inline, which the policy forbids."""
    page = browser.get("/console").text + browser.get("/console/login").text
    static = [file.read_text() for file in (CONSOLE / "static").iterdir()]
    templates = [file.read_text() for file in (CONSOLE / "templates").rglob("*.html")]
    assert len(templates) == 11
    for text in (page, *static, *templates):
        assert set(re.findall(r"https?://[^\"'\s<>]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert "//cdn" not in text
        assert "url(" not in text
        assert "eval(" not in text
    for text in (page, *templates):
        assert not re.search(r"<script>|<style|\sstyle=|\son[a-z]+=\"", text)


def test_the_wheel_has_every_file() -> None:
    options = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    patterns = options["package-data"]["peanut_serve"]
    packed = {file for pattern in patterns for file in (ROOT / "peanut_serve").glob(pattern)}
    files = {file for file in CONSOLE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert len(files) >= 14
    assert files <= packed


def test_every_action_is_the_control_s(browser: httpx.Client, control: FakeControl) -> None:
    for action in (
        {"verb": "activate", "name": "base"},
        {"verb": "pin", "name": "user/name"},
        {"verb": "unpin", "name": "user/name"},
        {"verb": "preload", "name": "user/name"},
        {"verb": "reload", "name": "user/name"},
        {"verb": "rollback", "name": "user/name"},
        {"verb": "rollback", "name": "user/name", "digest": "d0"},
        {"verb": "rollback", "name": "user/name", "digest": "d0", "hold": True},
        {"verb": "register", "name": "new", "source": "entry"},
        {"verb": "unregister", "name": "new", "drain": True},
    ):
        answer = browser.post("/console/act", json=action)
        assert answer.status_code == 200, answer.text
    assert control.calls == [
        ("activate", "base"),
        ("pin", "user/name", True),
        ("pin", "user/name", False),
        ("preload", "user/name"),
        ("reload", "user/name"),
        ("rollback", "user/name", None, False),
        ("rollback", "user/name", "d0", False),
        ("rollback", "user/name", "d0", True),
        ("register", "new", "entry"),
        ("unregister", "new", True),
    ]


@pytest.mark.parametrize(
    ("name", "status"), [("swap", 500), ("full", 429), ("down", 503), ("bug", 500), ("hub", 422)]
)
def test_refusals_keep_their_sentence(browser: httpx.Client, name: str, status: int) -> None:
    answer = browser.post("/console/act", json={"verb": "activate", "name": name})
    assert answer.status_code == status
    wanted = "unexpected KeyError; see the server's log" if name == "bug" else str(REFUSALS[name][0])
    assert answer.json() == {"error": wanted}


def events(answer: httpx.Response) -> list[dict]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_the_playground(browser: httpx.Client, completions: Completions) -> None:
    body = {"prompt": "Say who you are.", "variants": ["base", "user/name"], "max_tokens": 7, "temperature": 0.5}
    found = events(browser.post("/console/playground", json=body))
    starts = {one["of"]: (one["path"], one["digest"][:4]) for one in found if one["event"] == "start"}
    assert starts == {0: ("base weights", "base"), 1: ("merged", "user")}
    texts = ["".join(one["text"] for one in found if one["event"] == "text" and one["of"] == of) for of in (0, 1)]
    assert texts == ["I am base. Say who you are.", "I am user/name. Say who you are."]
    ends = [one for one in found if one["event"] == "end"]
    assert all(0 < one["first_seconds"] <= one["seconds"] for one in ends)
    assert found[-1]["event"] == "diff"
    assert ["gone", "base"] in found[-1]["parts"]
    assert {(one["max_tokens"], one["temperature"], one["stream"]) for one in completions.asked} == {(7, 0.5, True)}


def test_completions_of_plain_text(browser: httpx.Client, completions: Completions) -> None:
    body = {"prompt": "Once", "variants": ["base"], "chat": False}
    found = events(browser.post("/console/playground", json=body))
    assert "".join(one["text"] for one in found if one["event"] == "text") == "I am base. Once"
    assert completions.asked[0]["prompt"] == "Once"


def test_answers_that_fail(browser: httpx.Client, completions: Completions) -> None:
    completions.broken, completions.refused = {"swap"}, {"full"}
    body = {"prompt": "p", "variants": ["base", "swap", "full"]}
    found = events(browser.post("/console/playground", json=body))
    errors = {one["of"]: one["message"] for one in found if one["event"] == "error"}
    assert errors == {1: "aborted by a swap", 2: "the swap to full failed: <b>no memory</b>"}
    assert [one["event"] for one in found if one["of"] == 0][-1] == "end"
    assert not [one for one in found if one["event"] == "diff"]
    unknown = events(browser.post("/console/playground", json={"prompt": "p", "variants": ["none"]}))
    assert unknown == [{"of": 0, "event": "error", "message": "there is no variant 'none'"}]


def test_a_browser_that_leaves(browser: httpx.Client, completions: Completions) -> None:
    """Its answers are given up, and make room for others; more than two comparisons at a time are refused."""
    completions.endless = {"base"}
    body = {"prompt": "p", "variants": ["base"]}
    with browser.stream("POST", "/console/playground", json=body) as one:
        first = one.iter_lines()  # a name, as httpx closes the answer with it
        assert "start" in next(first)
        with browser.stream("POST", "/console/playground", json=body) as other:
            second = other.iter_lines()
            assert "start" in next(second)
            assert browser.post("/console/playground", json=body).status_code == 429
    until(lambda: completions.stopped == 2)
    completions.endless.clear()
    until(lambda: browser.post("/console/playground", json=body).status_code == 200)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "change",
    [{"variants": []}, {"variants": ["a"] * 4}, {"prompt": ""}, {"max_tokens": 0}, {"temperature": 3}, {"x": 1}],
)
def test_trials_are_bounded(browser: httpx.Client, completions: Completions, change: dict[str, object]) -> None:
    answer = browser.post("/console/playground", json={"prompt": "p", "variants": ["base"], **change})
    assert answer.status_code == 422
    assert completions.asked == []


def test_without_a_route(control: FakeControl) -> None:
    with serving_console(control) as url, logged_in(url) as client:
        assert client.post("/console/playground", json={"prompt": "p", "variants": ["base"]}).status_code == 503


def test_differences() -> None:
    assert difference("the grass is green.", "the sky is green.") == [
        ("same", "the "), ("gone", "grass"), ("new", "sky"), ("same", " is green.")
    ]  # fmt: skip
    assert difference("", "new") == [("new", "new")]
    assert difference("same", "same") == [("same", "same")]
    assert difference("a a a b", "a a b") == [("same", "a a "), ("gone", "a "), ("same", "b")]


def test_answers_that_repeat_themselves_are_compared_in_time() -> None:
    """A model that repeats a sign to its limit makes thousands of equal words."""
    began = time.monotonic()
    rest = [("gone", "!" * 1000 + "a"), ("new", "b")]
    assert difference("!" * 5000 + "a", "!" * 4000 + "b") == [("same", "!" * 4000), *rest]
    one, other = "x " * 2000, "y " * 2000 + "z"
    parts = difference(one, other)
    assert "".join(text for kind, text in parts if kind != "new") == one
    assert "".join(text for kind, text in parts if kind != "gone") == other
    assert time.monotonic() - began < 10


async def _endless(scope: Message, receive: object, send: Callable[[Message], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": b'data: {"a": 1}\n', "more_body": True})


def test_an_answer_that_is_not_read_is_given_up_at_once() -> None:
    """More of it is ready than anybody will read; the task that makes it ends nevertheless."""

    async def leave() -> float:
        async with aclosing(DataRoute(_endless, None).ask("/v1/completions", {})) as events:
            await anext(events)
            await asyncio.sleep(0.05)
            began = time.monotonic()
        assert len(asyncio.all_tasks()) == 1
        return time.monotonic() - began

    assert asyncio.run(leave()) < 2


def variant(name: str, **facts: object) -> VariantStatus:
    plain = FakeControl().variant("base").model_dump() | {"running": 0, "waiting": 0, "pinned": False}
    plain |= {"kind": "adapter", "state": VariantState.READY, "name": name, "digest": name}
    return VariantStatus.model_validate(plain | facts)


def swap(target: str, work: float, drain: float = 0.25, outcome: str = "done") -> SwapStatus:
    plain = FakeControl().swaps()[0].model_dump() | {"at": datetime.now(timezone.utc), "outcome": outcome}
    seconds = {"quiesce": drain, "apply": work / 2, "check": work / 2}
    return SwapStatus.model_validate(plain | {"target": target, "seconds": seconds})


BASE = variant("base", kind="base", state=VariantState.ACTIVE)


def view(*others: VariantStatus, swaps: tuple[SwapStatus, ...] = (), base: VariantStatus = BASE) -> View:
    return View(FakeControl().engine(), [base, *others], swaps, 60.0)


def test_what_a_swap_costs() -> None:
    math, code = variant("math"), variant("code", waiting=3)
    swaps = (swap("math", 2.0), swap("math", 100.0, outcome="rolled_back"), swap("math", 4.0), swap("code", 50.0))
    busy = view(math, code, swaps=swaps, base=BASE.model_copy(update={"running": 2}))
    cost = " ".join(action_cost("activate", busy, math))
    assert "2 running requests of base must end first: about 250 ms" in cost
    assert "those still running after 60 s are aborted" in cost
    assert "about 3.0 s after that (the median of 2 swaps)" in cost
    assert "These requests wait longer: 3 for code." in cost
    assert "evaluated first" not in cost
    assert "evaluated first" in " ".join(action_cost("activate", busy, variant("cold", host_bytes=0)))


def test_what_costs_nothing() -> None:
    active = variant("math", state=VariantState.ACTIVE)
    assert "nobody waits" in " ".join(action_cost("activate", view(active), active))
    lora = variant("fast", kind="lora")
    assert "nothing is swapped" in " ".join(action_cost("activate", view(lora), lora))
    assert "not known" in " ".join(action_cost("activate", view(variant("math")), variant("math")))


@pytest.mark.parametrize("verb", ["pin", "unpin", "preload", "reload", "rollback", "unregister"])
def test_every_action_says_what_it_costs(verb: str) -> None:
    for one in (variant("math", host_bytes=0), variant("math", state=VariantState.ACTIVE, running=1), BASE):
        assert all(action_cost(verb, view(one), one))
    assert action_cost("register", view(), None)


def test_what_a_comparison_costs() -> None:
    math, code, fast = variant("math"), variant("code"), variant("fast", kind="lora")
    here = view(math, code, fast, swaps=(swap("math", 1.75),))
    assert "needs no swap" in comparison_cost(here, ["base", "fast"])
    assert "1 swap here (about 2.0 s each)" in comparison_cost(here, ["base", "math"])
    assert "2 swaps here" in comparison_cost(here, ["math", "code"])
    assert "2 swaps here" in comparison_cost(here, ["math", "code", "fast"])
    assert comparison_cost(here, []) == "Choose variants to compare."


def test_estimates() -> None:
    assert estimate([], "math") is None
    assert estimate([swap("math", 1.0, outcome="rolled_back")], "math") is None
    found = estimate([swap("code", 1.0)], "math")
    assert found is not None
    assert (found.count, found.drain, found.work) == (1, 0.25, 1.0)
    assert (shown(0.0123), shown(12.34)) == ("12 ms", "12.3 s")
    counts = {0: "0 B", 1023: "1023 B", 1536: "2 KiB", 5 << 20: "5 MiB", 3 << 30: "3.0 GiB"}
    assert {count: size(count) for count in counts} == counts
