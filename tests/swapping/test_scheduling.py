"""The policy: its decisions, when they change, and their results on simulated traffic."""

from dataclasses import replace
from math import ceil, inf, nextafter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.server.traffic import TRACES, Outcome, Request, Server, first_come, one_by_one, ours, simulate, steady

from peanut_serve.swapping.policy import Policy, PriceEstimate, Queue, View, next_look, next_variant

POLICY = Policy(max_wait=10.0, min_dwell=0.5)


def view(now: float, running: int, *, since: float = 0.0, swap: float = 1.0, **queues: tuple[float, ...]) -> View:
    """Variant a is active."""
    return View(now, "a", since, running, tuple(Queue(*item) for item in queues.items()), swap)


def test_no_request_waits() -> None:
    for running in (0, 3):
        assert next_variant(view(99.0, running), POLICY) == "a"
        assert next_look(view(99.0, running), POLICY) is None


def test_an_idle_engine_swaps_at_once() -> None:
    assert next_variant(view(0.1, 0, b=(0.1,)), POLICY) == "b"
    assert next_variant(view(0.1, 1, b=(0.1,)), POLICY) == "a"
    assert next_variant(view(0.1, 0, a=(0.1,), b=(0.1,)), POLICY) == "a"  # not idle: a swap holds one request


def test_a_swap_pays_off_once_waiting_costs_as_much() -> None:
    busy = view(5.0, 4, swap=1.5, b=(4.0, 5.0))
    assert next_look(busy, POLICY) == 7.5  # 3.5 + 2.5 seconds of waiting are 4 times 1.5
    assert next_variant(replace(busy, now=7.4), POLICY) == "a"
    assert next_variant(replace(busy, now=7.5), POLICY) == "b"


def test_more_waiting_or_fewer_running_requests_make_it_sooner() -> None:
    look = next_look(view(5.0, 4, b=(5.0,)), POLICY)
    assert look == 9.0
    assert next_look(view(5.0, 4, b=(5.0, 5.0)), POLICY) == 7.0
    assert next_look(view(5.0, 3, b=(5.0,)), POLICY) == 8.0
    assert next_look(view(5.0, 3, a=(5.0,), b=(5.0,)), POLICY) == 9.0  # held requests are stopped too
    assert next_look(view(5.0, 4, swap=0.5, b=(5.0,)), POLICY) == 7.0


def test_time_waited_before_the_last_swap_does_not_count() -> None:
    assert next_variant(view(9.0, 2, since=1.0, b=(1.0,)), POLICY) == "b"
    assert next_variant(view(9.0, 2, since=8.0, b=(1.0,)), POLICY) == "a"
    assert next_look(view(9.0, 2, since=8.0, b=(1.0,)), POLICY) == 10.0


def test_an_overdue_request_comes_before_price_and_dwell() -> None:
    late = view(20.0, 500, since=19.9, swap=100.0, b=(10.1,), c=(15.0,) * 50)
    assert next_variant(late, POLICY) == "a"
    assert next_look(late, POLICY) == 20.1
    assert next_variant(replace(late, now=20.1), POLICY) == "b"


def test_the_oldest_overdue_request_is_first_even_if_its_variant_is_active() -> None:
    assert next_variant(view(20.0, 0, b=(2.0,) * 9, c=(1.0,)), POLICY) == "c"
    assert next_variant(view(20.0, 1, a=(0.5,), b=(2.0,) * 9, c=(1.0,)), POLICY) == "a"
    assert next_variant(view(20.0, 1, a=(1.5,), b=(2.0,) * 9, c=(1.0,)), POLICY) == "c"


def test_dwell_applies_to_a_variant_with_requests() -> None:
    free = {"since": 3.0, "swap": 0.0, "b": (3.0,)}
    assert next_variant(view(3.4, 1, **free), POLICY) == "a"
    assert next_look(view(3.4, 1, **free), POLICY) == 3.5
    assert next_variant(view(3.4, 1, **free), replace(POLICY, min_dwell=0.0)) == "b"
    assert next_variant(view(3.4, 0, **free), POLICY) == "b"


def test_many_or_old_requests_are_first() -> None:
    assert next_variant(view(5.0, 0, b=(4.0,), c=(4.5,) * 3), POLICY) == "c"
    assert next_variant(view(5.0, 0, b=(1.0,), c=(2.0,)), POLICY) == "b"
    assert next_variant(view(9.5, 0, b=(0.0,), c=(9.5, 9.5)), POLICY) == "b"


@pytest.mark.parametrize("max_wait", [0.0, 10.0, inf])
def test_ties_do_not_depend_on_the_order(max_wait: float) -> None:
    queues = tuple(Queue(digest, (1.0, 2.0)) for digest in "cbd")
    for running in (0, 1):
        one = View(9.0, "a", 0.0, running, queues, 1.0)
        for policy in (Policy(max_wait), Policy(max_wait, 0.0)):
            assert next_variant(one, policy) == next_variant(replace(one, queues=queues[::-1]), policy) == "b"


def test_the_price_follows_the_measurements() -> None:
    guess = PriceEstimate()
    assert guess.seconds > 0
    first = guess.after(4.0)
    assert first.seconds == 4.0  # the guess is not kept
    assert 4.0 < first.after(8.0).seconds < 6.0  # one slow swap does not determine it
    for _ in range(20):
        first = first.after(8.0)
    assert first.seconds == pytest.approx(8.0, abs=0.01)


SECONDS = st.one_of(st.floats(0, 100), st.integers(0, 100).map(float), st.integers(0, 400).map(lambda tick: tick / 4))
POLICIES = st.builds(Policy, st.one_of(SECONDS, st.just(inf)), st.one_of(SECONDS, st.just(inf)))


@st.composite
def views(draw: st.DrawFn) -> View:
    digests = draw(st.lists(st.sampled_from("abcdef"), unique=True))
    queues = [Queue(digest, tuple(sorted(draw(st.lists(SECONDS, min_size=1, max_size=6))))) for digest in digests]
    start = max([0.0, *(queue.arrivals[-1] for queue in queues)])
    since = draw(SECONDS)
    return View(max(start, since) + draw(SECONDS), "a", since, draw(st.integers(0, 20)), tuple(queues), draw(SECONDS))


@given(views(), POLICIES)
def test_only_a_ready_variant_is_returned(view: View, policy: Policy) -> None:
    assert next_variant(view, policy) in {view.active, *(queue.digest for queue in view.queues)}


@given(views(), POLICIES)
def test_with_overdue_requests_the_oldest_is_next(view: View, policy: Policy) -> None:
    oldest = min((queue.arrivals[0] for queue in view.queues), default=inf)
    if view.now >= oldest + policy.max_wait:
        assert next_variant(view, policy) in {queue.digest for queue in view.queues if queue.arrivals[0] == oldest}


@given(views(), POLICIES, st.lists(st.floats(0, 1), max_size=5))
def test_the_next_look_is_exact(view: View, policy: Policy, shares: list[float]) -> None:
    def answer(now: float) -> str:
        return next_variant(replace(view, now=now), policy)

    look, now = next_look(view, policy), answer(view.now)
    if look is None:
        assert {answer(view.now + 1e5 * share**3) for share in [*shares, 1.0]} == {now}
    else:
        assert view.now < look < inf
        assert answer(look) != now
        before = nextafter(look, -inf)
        between = [min(before, view.now + share * (before - view.now)) for share in shares]  # min: the sum is rounded
        assert {answer(moment) for moment in [*between, before]} == {now}


@st.composite
def traces(draw: st.DrawFn) -> list[Request]:
    one = st.tuples(st.floats(0, 30), st.sampled_from("aabcd"), st.floats(0.1, 5))
    return [Request(*each) for each in sorted(draw(st.lists(one, min_size=1, max_size=40, unique=True)))]


# one variant always has requests, and long ones; the others have few
LOPSIDED = st.builds(steady, st.integers(0, 99), st.just(400), st.floats(4, 12), st.just([1.0, 0.02, 0.01]))


@given(st.one_of(traces(), LOPSIDED), POLICIES, st.floats(0, 10), st.integers(1, 20))
def test_no_request_starves(trace: list[Request], policy: Policy, swap_seconds: float, slots: int) -> None:
    server = Server(slots, swap_seconds)
    outcome = simulate(trace, ours(policy), server)
    assert outcome.latencies.keys() == outcome.waits.keys() == set(trace)
    # Once a request is overdue, each variant may be active once before its own: a swap admits all requests that wait
    # for its variant, so later ones are younger. The engine takes jobs in order, hence the longest drain.
    drain = ceil(outcome.peak / slots) * max(request.service for request in trace)
    variants = len({request.digest for request in trace})
    bound = policy.max_wait + variants * (drain + swap_seconds)
    assert max(outcome.waits.values()) <= bound + 1e-6


def test_one_variant_never_waits() -> None:
    trace = [replace(request, digest="a") for request in TRACES["uniform"]]
    outcome = simulate(trace, ours(Policy()), Server())
    assert outcome.swaps == max(outcome.waits.values()) == 0


@pytest.fixture(scope="module", params=TRACES)
def served(request: pytest.FixtureRequest) -> tuple[str, Outcome, Outcome, Outcome]:
    trace = TRACES[request.param]
    return request.param, *(simulate(trace, each, Server()) for each in (ours(Policy()), first_come, one_by_one))


# upper bounds of swaps and mean latency, as fractions of those of other policies, with 4 to 8 variants
PARTS = {"light": (0.95, 0.8), "uniform": (0.4, 0.1), "zipf": (0.4, 0.1), "bursts": (0.7, 0.4)}


def test_it_beats_strict_order(served: tuple[str, Outcome, Outcome, Outcome]) -> None:
    name, own, strict, _ = served
    swaps, mean = PARTS[name]
    assert own.swaps <= swaps * strict.swaps
    assert own.mean <= mean * strict.mean
    assert own.p99 < strict.p99
    assert own.makespan <= strict.makespan


def test_it_beats_a_swap_per_request(served: tuple[str, Outcome, Outcome, Outcome]) -> None:
    name, own, _, single = served
    swaps, mean = PARTS[name]
    assert own.swaps <= swaps * single.swaps
    assert own.mean <= min(mean, 0.7) * single.mean


def test_max_wait_is_for_the_rare_variant() -> None:
    """Without a limit, the mean is better, but rare variants wait longer; at 0, only age counts, with more swaps."""
    endless, some = (simulate(TRACES["zipf"], ours(Policy(max_wait=each)), Server()) for each in (inf, 10.0))
    assert endless.mean < some.mean
    assert max(endless.waits.values()) > 2 * max(some.waits.values())
    none, some = (simulate(TRACES["uniform"], ours(Policy(max_wait=each)), Server()) for each in (0.0, 10.0))
    assert none.swaps > some.swaps
    assert none.mean > 1.1 * some.mean


def test_min_dwell_is_for_cheap_swaps() -> None:
    """At a price near 0, swaps are immediate, but drain the engine; without a limit, only max_wait causes a swap."""
    busy, server = steady(1, 600, 5.0, [1.0] * 4), Server(swap_seconds=0.1)
    none, some, endless = (simulate(busy, ours(Policy(min_dwell=each)), server) for each in (0.0, 1.0, inf))
    assert none.swaps > 1.1 * some.swaps > 1.3 * endless.swaps
    assert some.mean < 0.95 * none.mean
    assert max(endless.waits.values()) > Policy().max_wait > max(some.waits.values())
