"""What an action will cost, in sentences: said before it is confirmed, from what was measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from peanut_serve.web.console.live_pages import shown, size
from peanut_serve.web.schema import EngineStatus, SwapStatus, VariantState, VariantStatus

_MOST_SWAPS = 10  # the latest ones tell best what the next one takes
_MERGED = ("adapter", "checkpoint")


@dataclass(frozen=True)
class View:
    """The server when the question was asked.

    Attributes:
        engine: the engine.
        variants: all of them.
        swaps: the latest swaps.
        drain_seconds: after which a swap aborts running requests.
    """

    engine: EngineStatus
    variants: Sequence[VariantStatus]
    swaps: Sequence[SwapStatus]
    drain_seconds: float


@dataclass(frozen=True)
class Estimate:
    """Medians of the latest swaps that succeeded.

    Attributes:
        count: how many there were.
        drain: seconds until the running requests had ended.
        work: seconds of the swap after that.
    """

    count: int
    drain: float
    work: float


def estimate(swaps: Sequence[SwapStatus], target: str) -> Estimate | None:
    """What a swap to `target` will take: by the swaps to it, or by all if there was none; None without any."""
    done = [swap for swap in swaps if swap.outcome == "done"]
    latest = ([swap for swap in done if swap.target == target] or done)[:_MOST_SWAPS]
    if not latest:
        return None
    drains = [swap.seconds.get("quiesce", 0.0) for swap in latest]
    works = [sum(swap.seconds.values()) - drain for swap, drain in zip(latest, drains, strict=True)]
    return Estimate(len(latest), median(drains), median(works))


def swap_cost(view: View, one: VariantStatus) -> Iterator[str]:
    """What it costs to give a variant the engine."""
    base = next((variant for variant in view.variants if variant.kind == "base"), None)
    runs_on = one if one.kind in _MERGED or base is None else base
    if one.kind == "lora":
        yield f"{one.name} is served as LoRA on the base's weights: no swap is needed while the engine has them."
    if runs_on.state is VariantState.ACTIVE:
        yield "The engine has these weights already: nothing is swapped, and nobody waits."
        return
    if one.kind in _MERGED and not one.host_bytes:
        yield (
            "Its weights are not in host memory. They are evaluated first, which can take minutes; others are "
            "answered meanwhile."
        )
    yield from _drain(view)
    found = estimate(view.swaps, runs_on.name)
    if found is None:
        yield "No swap has been measured since the server started, so its duration is not known."
    else:
        swaps = "the latest swap" if found.count == 1 else f"the median of {found.count} swaps"
        yield f"The swap itself takes about {shown(found.work)} after that ({swaps})."
    yield from _waiting(view, one)


def _drain(view: View) -> Iterator[str]:
    running = {one.name: one.running for one in view.variants if one.running}
    if not running:
        yield "No request is running, so there is nothing to wait for."
        return
    found = estimate(view.swaps, "")
    about = f": about {shown(found.drain)}, by the latest swaps" if found is not None else ""
    limit = view.drain_seconds
    end = f"those still running after {limit:g} s are aborted" if limit else "they are aborted"
    count = _counted(max(running.values()), "running request")
    yield f"{count} of {view.engine.active} must end first{about}; {end}."


def _waiting(view: View, one: VariantStatus) -> Iterator[str]:
    waiting = {other.name: other.waiting for other in view.variants if other.waiting and other.name != one.name}
    if waiting:
        queued = ", ".join(f"{count} for {name}" for name, count in waiting.items())
        yield f"These requests wait longer: {queued}."
    yield "New requests for every other merged variant wait until the policy gives it the engine."


def action_cost(action: str, view: View, one: VariantStatus | None) -> list[str]:
    """What an action costs, and what it does, in sentences."""
    if one is None:
        return ["The variant is evaluated, which can take minutes. Other requests are answered meanwhile."]
    if action == "activate":
        return list(swap_cost(view, one))
    if action in ("pin", "preload"):
        return list(_host_cost(action, view, one))
    return list(_change_cost(action, view, one))


def _host_cost(action: str, view: View, one: VariantStatus) -> Iterator[str]:
    if one.kind not in _MERGED:
        yield "It has no weights of its own in host memory: nothing is evaluated."
        return
    if one.host_bytes:
        yield f"Its weights are in host memory already ({size(one.host_bytes)})."
    else:
        left = view.engine.host_cache_limit - view.engine.host_cache_bytes
        yield (
            f"Its weights are evaluated into host memory, which can take minutes. {size(left)} of the host cache are "
            "free; if that is not enough, the least recently used variants are evicted."
        )
    if action == "pin":
        yield "Pinned weights are never evicted. If too much is pinned, other variants get an error (422)."
    yield "Nobody waits: requests are answered meanwhile."


def _change_cost(action: str, view: View, one: VariantStatus) -> Iterator[str]:
    if action == "unpin":
        yield "Its weights may be evicted from host memory. The next swap to it then evaluates them again."
    elif action == "unregister":
        requests = one.running + one.waiting
        has = f"It has {_counted(requests, 'request')}: without draining, it is not removed." if requests else ""
        yield f"Requests for {one.name} get an error (404) from then on. Its files are kept. {has}".strip()
    else:
        yield (
            "Its files are read again. The version of now is kept for a rollback."
            if action == "reload"
            else f"Requests for {one.name} get the earlier version from then on."
        )
        yield "Weights that are not in host memory are evaluated, which can take minutes; nobody waits for that."
        if one.state is VariantState.ACTIVE:
            yield "If they differ, the next request for it needs a swap:"
            yield from _drain(view)
            if (found := estimate(view.swaps, one.name)) is not None:
                yield f"The swap itself takes about {shown(found.work)} after that."


def comparison_cost(view: View, names: Sequence[str]) -> str:
    """What it costs to ask several variants the same: swaps, if their weights are merged."""
    chosen = [one for one in view.variants if one.name in names]
    merged = {one.digest or one.name for one in chosen if one.kind in _MERGED}
    on_base = any(one.kind not in _MERGED for one in chosen)
    base = [one for one in view.variants if one.kind == "base"] if on_base else []
    is_resident = any(one.state is VariantState.ACTIVE for one in [*chosen, *base])
    swaps = len(merged) + on_base - is_resident
    if not merged or swaps <= 0:
        return "This comparison needs no swap." if chosen else "Choose variants to compare."
    found = estimate(view.swaps, "")
    each = f"about {shown(found.drain + found.work)} each" if found is not None else "none has been measured yet"
    return (
        f"Comparing merged variants costs swaps: {_counted(swaps, 'swap')} here ({each}). The answers come one after "
        "another, and all other requests wait during each swap."
    )


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
