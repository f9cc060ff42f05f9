"""Which replica gets a request."""

import random

import pytest

from peanut_serve.ray.placement import Popularity, Replica, cost, preferred, ranked


def merged(name: str, resident: str, running: int = 0, **waiting: int) -> Replica:
    return Replica(name, frozenset([resident]), 1, waiting, running)


def test_the_replica_that_has_the_variant_comes_first() -> None:
    fleet = [merged("a", "x"), merged("b", "y"), merged("c", "z")]
    for replica in fleet:
        (variant,) = replica.resident
        assert ranked(variant, fleet, Popularity())[0] == replica.name


def test_a_replica_whose_queue_is_full_of_other_variants_is_passed_over() -> None:
    fleet = [merged("busy", "x", 8, p=1, q=1, r=1), merged("idle", "y")]
    assert ranked("x", fleet, Popularity()) == ["idle", "busy"]


def test_requests_join_those_of_their_variant_that_wait_already() -> None:
    fleet = [merged("queued", "y", 4, x=3), merged("running", "z", 4)]
    assert ranked("x", fleet, Popularity())[0] == "queued"


def test_a_popular_variant_is_not_evicted_for_a_rare_one() -> None:
    popularity = Popularity()
    for number in range(100):
        popularity.count("hot" if number % 10 else "cold", now=0)
    fleet = [merged("a", "hot"), merged("b", "cold")]
    assert ranked("rare", fleet, popularity)[0] == "b"


def test_a_replica_without_weights_of_any_variant_is_as_good_as_one_with_a_forgotten_one() -> None:
    fresh, forgotten = Replica("fresh"), merged("forgotten", "old")
    assert cost("x", fresh, Popularity(), 2) == cost("x", forgotten, Popularity(), 2)


def test_adapters_that_run_beside_each_other_are_placed_by_their_slots() -> None:
    """LoRA mode: nobody waits for a turn."""
    full = Replica("full", frozenset("abcd"), 4, {}, 3)
    free = Replica("free", frozenset("ab"), 4, {}, 3)
    popularity = Popularity()
    popularity.count("c", 0)
    assert ranked("c", [full, free], popularity)[0] == "full"
    assert ranked("x", [full, free], popularity)[0] == "free"


def test_load_decides_between_replicas_that_cost_the_same() -> None:
    fleet = [Replica(str(number), frozenset("x"), 1, {}, running=number * 4) for number in range(4)]
    assert ranked("x", fleet, Popularity()) == ["0", "1", "2", "3"]


def test_every_replica_is_ranked_once_and_alike_at_every_front() -> None:
    generator = random.Random(1)
    for _ in range(200):
        names = [f"replica-{number}" for number in range(generator.randint(1, 9))]
        fleet = [
            merged(name, generator.choice("xyz"), generator.randint(0, 5), p=generator.randint(0, 2))
            for name in names
        ]
        order = ranked("x", fleet, Popularity())
        assert sorted(order) == names
        assert order == ranked("x", generator.sample(fleet, len(fleet)), Popularity())


def test_a_replica_that_goes_moves_only_its_own_variants() -> None:
    names = [f"replica-{number}" for number in range(5)]
    homes = {variant: preferred(variant, names)[0] for variant in map(str, range(300))}
    left = [name for name in names if name != "replica-2"]
    moved = {variant for variant, home in homes.items() if preferred(variant, left)[0] != home}
    assert moved == {variant for variant, home in homes.items() if home == "replica-2"}
    assert 30 < len(moved) < 90  # a fifth of 300, more or less


@pytest.mark.parametrize("seconds", [31.0, 1000.0])
def test_popularity_fades(seconds: float) -> None:
    popularity = Popularity()
    for _ in range(10):
        popularity.count("old", now=1)
    popularity.count("new", now=seconds)
    assert popularity.share(["new"]) == pytest.approx(1 / (1 + 10 * 0.7))
    assert popularity.share(["old", "new"]) == pytest.approx(1)
    assert Popularity().share(["old"]) == 0


def test_names_that_clients_make_up_do_not_fill_the_memory() -> None:
    popularity = Popularity()
    for number in range(50_000):
        popularity.count(f"made-up-{number}", now=1)
    popularity.count("made-up-0", now=1)
    assert popularity.share(["made-up-0"]) == pytest.approx(2 / 10_001)
    assert popularity.share(["made-up-49999"]) == 0
