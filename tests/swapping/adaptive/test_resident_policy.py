"""Who should be the resident: decisions, hysteresis, and what comes of them on simulated traffic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.adaptive.steps import BASE, Engine, Found, Mix, as_adaptive, as_lora, as_merged

from peanut_serve.swapping.adaptive.gathering import Gathering
from peanut_serve.swapping.adaptive.policy import Choice, Costs, Demand, saved, smoothed

COSTS = Costs(0.4, 2.0, Gathering(seats=8))
ABLE = frozenset({"base", "a", "b"})


def load(**running: float) -> dict[str, Demand]:
    return {name: Demand(mean, mean / 3) for name, mean in running.items()}


def looked(choice: Choice, seconds: int, costs: Costs = COSTS, **running: float) -> Choice:
    for _ in range(seconds):
        choice = choice.after(load(**running), 1.0, costs, ABLE)
    return choice


def test_what_a_resident_saves() -> None:
    assert saved("a", load(a=8), COSTS) == pytest.approx(0.4)  # every step is without LoRA
    assert saved("base", load(a=8), COSTS) == 0.0
    assert saved("a", load(a=7, b=1), COSTS) == pytest.approx(0.4 * (7 / 8) ** 8)
    assert saved("a", load(a=0.5), COSTS) == pytest.approx(0.2)  # half of the time, the engine has nothing to do
    assert saved("a", load(a=0.3, b=0.2), COSTS) == pytest.approx(0.4 * 0.5 * 0.6)  # seldom two at once
    assert saved("a", {}, COSTS) == 0.0


def test_groups_leave_steps_to_the_resident() -> None:
    gathered, mixed = Costs(0.4, 2.0, Gathering(3.0, 8)), load(a=12.8, b=3.2)
    assert saved("a", mixed, gathered) == pytest.approx(0.4 * (1 - 0.2 * (1 + 8 / (1 + 3.2))))
    assert saved("a", mixed, gathered) > 2 * saved("a", mixed, COSTS)
    # with room in a step, they are admitted earlier
    assert saved("a", load(a=5.6, b=1.4), gathered) == pytest.approx(0.4 * 0.8**7)


def test_the_busy_variant_becomes_the_resident_after_a_while() -> None:
    early, late = looked(Choice("base"), 10, a=8), looked(Choice("base"), 60, a=8)
    assert (early.resident, late.resident) == ("base", "a")
    assert late.saved > 0
    assert looked(late, 60, a=8).resident == "a"
    assert looked(late, 90, b=8).resident == "b"
    assert looked(late, 90, base=8).resident == "base"


def test_a_burst_changes_nothing() -> None:
    settled = looked(Choice("base"), 60, a=4)
    burst = looked(settled, 8, a=1, b=7)
    assert burst.resident == "a"
    assert looked(burst, 60, a=4).gains == {}  # it is forgotten


def test_alternation_changes_nothing() -> None:
    choice = looked(Choice("base"), 60, a=8)
    for _ in range(100):
        choice = looked(looked(choice, 3, b=8), 3, a=8)
        assert choice.resident == "a"


def test_who_is_not_able_never_becomes_the_resident() -> None:
    choice = Choice("base")
    for _ in range(300):
        choice = choice.after(load(a=8), 1.0, COSTS, {"base", "b"})
    assert (choice.resident, choice.gains) == ("base", {})


def test_a_dear_change_takes_longer() -> None:
    dear = Costs(0.4, 20.0, Gathering(seats=8))
    assert looked(Choice("base"), 60, dear, a=8).resident == "base"
    assert looked(Choice("base"), 300, dear, a=8).resident == "a"


def test_the_state_after_a_failure() -> None:
    choice = looked(Choice("base"), 60, a=8)
    assert choice.at("a") is choice
    assert (choice.at("base").resident, choice.at("base").gains) == ("base", {})


@given(st.dictionaries(st.sampled_from("abc"), st.floats(0, 50)), st.floats(0, 10), st.integers(1, 64))
def test_nobody_saves_more_than_there_is(running: dict[str, float], gather: float, seats: int) -> None:
    demand = {name: Demand(mean, mean) for name, mean in running.items()}
    for name in "abc":
        assert 0.0 <= saved(name, demand, Costs(0.4, 1.0, Gathering(gather, seats))) <= 0.4


def test_the_load_is_smoothed_and_forgotten() -> None:
    demand = smoothed({}, load(a=8), 1.0)
    assert 0 < demand["a"].running < 1
    for _ in range(200):
        demand = smoothed(demand, load(b=8), 1.0)
    assert set(demand) == {"b"}
    assert demand["b"].running == pytest.approx(8)


def shifting(now: float) -> dict[str, float]:
    """The hot task is another one each minute."""
    hot = f"v{int(now // 60) % 4}"
    return {**dict.fromkeys(("v0", "v1", "v2", "v3"), 0.2 / 3), hot: 0.8}


TRACES: dict[str, Mix] = {
    "80/20": lambda now: {"v0": 0.8, "v1": 0.1, "v2": 0.1},
    "50/30/20": lambda now: {"v0": 0.5, "v1": 0.3, "v2": 0.2},
    "uniform": lambda now: dict.fromkeys([f"v{i}" for i in range(8)], 1.0),
    "shifting": shifting,
    "all base": lambda now: {BASE: 1.0},
    "one": lambda now: {"v0": 1.0},
}
SECONDS = 600.0
GATHER = 8.0


def compared(trace: str, clients: int) -> tuple[Found, Found, Found]:
    engines = [Engine(TRACES[trace], clients) for _ in range(3)]
    found = as_lora(engines[0], SECONDS), as_merged(engines[1], SECONDS), as_adaptive(engines[2], SECONDS, GATHER)
    print(f"{trace}, {clients} clients", *(f"{one.rate:.0f} ({one.changes})" for one in found))
    return found


@pytest.mark.parametrize("clients", [4, 8, 24])
@pytest.mark.parametrize("trace", TRACES)
def test_it_is_never_worse_than_lora(trace: str, clients: int) -> None:
    """Nor than merged weights, unless three times as many ask as there are places: then each gets whole batches."""
    lora, merged, adaptive = compared(trace, clients)
    assert adaptive.rate >= 0.95 * lora.rate
    if clients <= 8:
        assert adaptive.rate >= 0.95 * max(lora.rate, merged.rate)
    assert adaptive.changes <= SECONDS / 60


@pytest.mark.parametrize(("clients", "more"), [(4, 1.15), (8, 1.05), (24, 1.12)])
def test_it_is_better_where_one_variant_is_busy(clients: int, more: float) -> None:
    lora, merged, adaptive = compared("80/20", clients)
    assert adaptive.rate >= more * lora.rate
    assert adaptive.p95("v1", "v2") <= 1.5 * lora.p95("v1", "v2")
    assert adaptive.p95("v1", "v2") < merged.p95("v1", "v2")


def test_others_pay_for_more() -> None:
    """Gathered for longer, more steps are without LoRA: 1.25 times the rate of LoRA needs a queue."""
    found = [as_adaptive(Engine(TRACES["80/20"], 24), SECONDS, gather) for gather in (0.0, 8.0, 16.0)]
    lora = as_lora(Engine(TRACES["80/20"], 24), SECONDS)
    print([(round(one.rate), round(one.p95("v1", "v2"), 1)) for one in [lora, *found]])
    assert [one.rate > other.rate for one, other in zip(found[1:], found[:-1], strict=True)] == [True, True]
    assert found[2].rate >= 1.25 * lora.rate
    assert found[2].p95("v1", "v2") <= 1.5 * lora.p95("v1", "v2")
