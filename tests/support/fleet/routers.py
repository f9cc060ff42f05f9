"""How requests find a replica of the simulated fleet: by the product's placement, and by what it is compared with."""

import random
from collections.abc import Sequence

from support.fleet.simulated import Engine, Router

from peanut_serve.ray.placement import Popularity, preferred, ranked


def by_cost() -> Router:
    popularity = Popularity()

    def route(variant: str, engines: Sequence[Engine], now: float) -> Engine:
        popularity.count(variant, now)
        best = ranked(variant, [engine.view() for engine in engines], popularity)[0]
        return next(engine for engine in engines if engine.name == best)

    return route


def power_of_two() -> Router:
    """The shorter queue of two random replicas: Ray Serve's own router."""
    numbers = random.Random(0)

    def route(variant: str, engines: Sequence[Engine], now: float) -> Engine:
        return min(numbers.sample(engines, 2), key=lambda engine: engine.view().load)

    return route


def by_hash() -> Router:
    homes: dict[str, int] = {}

    def route(variant: str, engines: Sequence[Engine], now: float) -> Engine:
        names = [engine.name for engine in engines]
        if variant not in homes:
            homes[variant] = names.index(preferred(variant, names)[0])
        return engines[homes[variant]]

    return route


def resident_first(spill: int = 3) -> Router:
    """A replica that has the variant, or got it last, unless it has `spill` requests more than the idlest one."""
    last: dict[str, str] = {}

    def route(variant: str, engines: Sequence[Engine], now: float) -> Engine:
        least = min(engine.view().load for engine in engines)
        having = [engine for engine in engines if variant in (engine.resident, last.get(engine.name))]
        having.sort(key=lambda engine: engine.view().load)
        names = {engine.name: engine for engine in engines}
        order = [*having, *(names[name] for name in preferred(variant, names))]
        chosen = next(engine for engine in order if engine.view().load <= least + spill)
        last[chosen.name] = variant
        return chosen

    return route
