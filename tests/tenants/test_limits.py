"""How much a tenant gets, and what is counted of it."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from support.server.tenants import Clock, entry, tenants_of, token_of, write_keys

from peanut_serve.errors import ForbiddenError, TenantLimitError, UnauthorizedError, UnknownVariantError
from peanut_serve.tenants.usage import USAGE, UsageBook, Used, count_tokens
from peanut_serve.tenants.visits import Tenants, Visit, current_tenant, current_visit


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def enter(tenants: Tenants, name: str) -> Visit:
    return asyncio.run(tenants.enter(token_of(name).encode()))


def refusals(tenant: str, reason: str) -> float:
    return REGISTRY.get_sample_value("peanut_refused_requests_total", {"tenant": tenant, "reason": reason}) or 0.0


def test_the_rate(file: Path) -> None:
    clock = Clock()
    tenants = tenants_of(write_keys(file, entry("a", requests_per_minute=30), entry("b")), clock=clock)
    before = refusals("a", "rate")
    for _ in range(30):
        with enter(tenants, "a"):
            pass
    with pytest.raises(TenantLimitError, match="a may send 30 requests a minute") as refused:
        enter(tenants, "a")
    assert (refused.value.status, refused.value.retry_after) == (429, 2)
    assert refusals("a", "rate") == before + 1
    for _ in range(100):
        with enter(tenants, "b"):
            pass
    clock.now += 1.9
    with pytest.raises(TenantLimitError):
        enter(tenants, "a")
    clock.now += 0.2
    with enter(tenants, "a"):
        pass
    with pytest.raises(TenantLimitError):
        enter(tenants, "a")
    clock.now += 3600  # no more than those of a minute are saved
    for _ in range(30):
        with enter(tenants, "a"):
            pass
    with pytest.raises(TenantLimitError):
        enter(tenants, "a")


def test_what_may_be_sent_is_told(file: Path) -> None:
    clock = Clock()
    entries = [entry("a", requests_per_minute=30, places=2), entry("b")]
    tenants = tenants_of(write_keys(file, *entries), clock=clock)
    first = enter(tenants, "a")
    assert first.rate_headers() == [
        (b"x-ratelimit-limit-requests", b"30"),
        (b"x-ratelimit-remaining-requests", b"29"),
        (b"x-ratelimit-reset-requests", b"2s"),
    ]
    clock.now += 1
    assert dict(first.rate_headers())[b"x-ratelimit-reset-requests"] == b"1s"
    enter(tenants, "a")
    with pytest.raises(TenantLimitError, match="may have 2") as refused:
        enter(tenants, "a")
    assert dict(refused.value.headers)[b"x-ratelimit-remaining-requests"] == b"28"
    with first:
        pass
    for _ in range(28):
        with enter(tenants, "a"):
            pass
    with pytest.raises(TenantLimitError, match="may send 30") as refused:
        enter(tenants, "a")
    assert dict(refused.value.headers)[b"x-ratelimit-remaining-requests"] == b"0"
    assert enter(tenants, "b").rate_headers() == []


def test_a_rate_below_one_a_second_says_when(file: Path) -> None:
    tenants = tenants_of(write_keys(file, entry("a", requests_per_minute=1)), clock=Clock())
    enter(tenants, "a")
    with pytest.raises(TenantLimitError) as refused:
        enter(tenants, "a")
    assert refused.value.retry_after == 60


def test_the_places(file: Path) -> None:
    tenants = tenants_of(write_keys(file, entry("a", places=2), entry("b")))
    first, second = enter(tenants, "a"), enter(tenants, "a")
    first.admit()  # it runs, and has its place still
    with pytest.raises(TenantLimitError, match="a has 2 requests in the server, and may have 2") as refused:
        enter(tenants, "a")
    assert refused.value.retry_after == 1
    enter(tenants, "b")
    with second:
        pass
    third = enter(tenants, "a")
    with first, third:
        pass
    with enter(tenants, "a"), enter(tenants, "a"):
        pass


def test_a_place_that_is_given_back_in_a_moment_is_waited_for(file: Path) -> None:
    """A client has its answer before its request has ended, and sends the next one at once."""
    tenants = tenants_of(write_keys(file, entry("a", places=1)))

    async def test() -> None:
        first = await tenants.enter(token_of("a").encode())
        next_one = asyncio.create_task(tenants.enter(token_of("a").encode()))
        await asyncio.sleep(0.01)
        with first:
            pass
        assert (await next_one).tenant == "a"

    asyncio.run(asyncio.wait_for(test(), 10))


def test_one_tenant_cannot_take_the_whole_queue(file: Path) -> None:
    tenants = tenants_of(write_keys(file, entry("a", places=1000), entry("b")), most_waiting=10)
    waiting = [enter(tenants, "a") for _ in range(5)]
    with pytest.raises(TenantLimitError, match="5 requests of a wait, which is half of all places"):
        enter(tenants, "a")
    enter(tenants, "b")
    waiting[0].admit()
    waiting[0].admit()  # said twice, counted once
    enter(tenants, "a")
    with pytest.raises(TenantLimitError):
        enter(tenants, "a")
    with waiting[0]:
        pass
    with pytest.raises(TenantLimitError):
        enter(tenants, "a")


def test_a_refused_request_takes_no_place(file: Path) -> None:
    clock = Clock()
    tenants = tenants_of(write_keys(file, entry("a", places=1, requests_per_minute=60)), clock=clock)
    visit = enter(tenants, "a")
    for _ in range(3):
        with pytest.raises(TenantLimitError, match="in the server"):
            enter(tenants, "a")
    with visit:
        pass
    for _ in range(59):  # what was refused for its place has not been counted as sent
        with enter(tenants, "a"):
            pass


def test_who_is_let_in(file: Path) -> None:
    tenants = tenants_of(write_keys(file, entry("a"), entry("boss", role="admin"), entry("eye", role="read-only")))
    for token in (b"", b"wrong", entry("a")["sha256"].encode(), bytes.fromhex(entry("a")["sha256"])):
        with pytest.raises(UnauthorizedError):
            asyncio.run(tenants.enter(token))
    for name in ("boss", "eye"):
        with pytest.raises(ForbiddenError, match=f"the key of {name} has the role"):
            enter(tenants, name)
    assert enter(tenants, "a").tenant == "a"


def test_what_it_may_use(file: Path) -> None:
    tenants = tenants_of(write_keys(file, entry("a", variants=["gsm8k", "math-*"]), entry("none", variants=[])))
    visit = enter(tenants, "a")
    visit.check("gsm8k")
    visit.check("math-")
    before = refusals("a", "variant")
    for name in ("style", "GSM8K", "gsm8k ", "", "base"):
        with pytest.raises(ForbiddenError, match="the key of a may not use"):
            visit.check(name)
    assert refusals("a", "variant") == before + 5
    with pytest.raises(ForbiddenError):
        enter(tenants, "none").check("gsm8k")
    Visit().check("style")
    unknown = UnknownVariantError("there is no variant math-9; the available variants are secret")
    assert str(visit.without_names(unknown, "math-9")) == "there is no variant math-9"
    assert Visit().without_names(unknown, "math-9") is unknown


def test_limits_change_with_the_file(file: Path) -> None:
    clock = Clock()
    tenants = tenants_of(write_keys(file, entry("a", places=1)), clock=clock)
    visit = enter(tenants, "a")
    write_keys(file, entry("a", places=2, variants=["v1"]))
    clock.now += 1
    second = enter(tenants, "a")  # beside the one that was there before
    with pytest.raises(TenantLimitError):
        enter(tenants, "a")
    visit.check("v2")  # it came before the change
    with pytest.raises(ForbiddenError):
        second.check("v2")


def test_usage_is_counted_from_the_admission(file: Path) -> None:
    clock = Clock()
    tenants = tenants_of(write_keys(file, entry("meter")), clock=clock)
    with enter(tenants, "meter") as refused:
        refused.count("v-limits")
    with enter(tenants, "meter") as visit:
        clock.now += 7
        visit.admit()
        clock.now += 2.5
        current_visit.set(visit)
        count_tokens("v-limits", current_tenant(), 11, 5)
        visit.count("v-limits")
    current_visit.set(None)
    found = {names: used for *names, used in USAGE.sums() for names in [tuple(names)]}
    assert found["v-limits", "meter"] == Used(1, 11, 5, 2.5)
    labels = {"variant": "v-limits", "tenant": "meter"}
    families = ("requests", "prompt_tokens", "generated_tokens", "engine_seconds")
    samples = [REGISTRY.get_sample_value(f"peanut_usage_{family}_total", labels) for family in families]
    assert samples == [1, 11, 5, 2.5]


def test_what_is_gone_becomes_other_and_no_sum_gets_smaller() -> None:
    book = UsageBook()
    for variant, tenant in (("v1", "a"), ("v1", "b"), ("v2", "a"), ("other", "a"), ("v1", "other")):
        book.add(variant, tenant, Used(1, 2, 3, 4.0))
    book.forget_variant("v1")
    book.forget_variant("other")
    assert [(*names, used.requests) for *names, used in book.sums()] == [
        ("other", "a", 2), ("other", "b", 1), ("other", "other", 1), ("v2", "a", 1)
    ]  # fmt: skip
    book.forget_tenant("a")
    book.forget_tenant("other")
    assert [(*names, used.requests) for *names, used in book.sums()] == [
        ("other", "b", 1), ("other", "other", 3), ("v2", "other", 1)
    ]  # fmt: skip
    assert sum(used.engine_seconds for *_, used in book.sums()) == 20


def test_a_tenant_that_leaves_the_file_while_it_is_answered(file: Path) -> None:
    clock = Clock()
    tenants = tenants_of(write_keys(file, entry("leaver", places=1), entry("stayer")), clock=clock)
    visit = enter(tenants, "leaver")
    visit.admit()
    with pytest.raises(TenantLimitError):
        enter(tenants, "leaver")
    write_keys(file, entry("stayer"))
    clock.now += 1
    enter(tenants, "stayer")
    with pytest.raises(UnauthorizedError):
        enter(tenants, "leaver")
    with visit:
        visit.count("v-leaver")
    labels = {sample.labels["tenant"] for family in USAGE.collect() for sample in family.samples}
    assert "leaver" not in labels
    assert refusals("leaver", "places") == 0
