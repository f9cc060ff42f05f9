"""What the pages show of a server that swaps variants."""

from collections.abc import Sequence
from typing import Any

from peanut_serve.web.console.actions import LABELS, Verb
from peanut_serve.web.console.costs import View, action_cost
from peanut_serve.web.console.live_pages import LivePages, Part, parts_of, shown, size
from peanut_serve.web.schema import Control, SwapStatus, VariantStatus, VariantTraffic

_TITLES = {
    "engine": "Engine", "queue": "Queue", "variants": "Variants", "memory": "Memory", "swaps": "Swaps",
    "traffic": "Requests", "versions": "Versions",
}  # fmt: skip
_PATHS = {"base": "base weights", "adapter": "merged", "checkpoint": "merged folder", "lora": "LoRA"}
_CAUSES = {
    "operator": "an operator asked for it",
    "overdue": "a request had waited for --max-wait",
    "idle": "no request was running",
    "paid": "waiting had cost as much as the swap",
    "engine_died": "the engine died",
}
_OUTCOMES = {
    "done": "done",
    "cancelled": "failed: nothing was loaded",
    "rolled_back": "failed: rolled back",
    "restarted": "engine restarted, with the base's weights",
    "down": "failed: no engine",
}


class Pages(LivePages):
    """What a control says.

    Args:
        control: the server.
        drain_seconds: after which a swap aborts running requests.
    """

    def __init__(self, control: Control, drain_seconds: float) -> None:
        names = {"labels": LABELS, "paths": _PATHS, "causes": _CAUSES, "outcomes": _OUTCOMES}
        super().__init__(_TITLES, names)
        self._control, self._drain_seconds = control, drain_seconds

    async def view(self) -> View:
        """The server now."""
        control = self._control
        return View(control.engine(), await control.variants(), control.swaps(), self._drain_seconds)

    async def names(self) -> list[str]:
        """All variants."""
        return [one.name for one in (await self.view()).variants]

    async def facts(self) -> dict[str, Any]:
        """What the sections show now."""
        view, traffic = await self.view(), await self._control.traffic()
        return {
            "engine": view.engine,
            "variants": view.variants,
            "swaps": [(swap, _phases(swap)) for swap in view.swaps],
            "traffic": traffic,
            "memory": _memory(view),
            "verbs": {one.name: _verbs(one) for one in view.variants},
            "queue": _queue(view),
            "total": _total(traffic),
        }

    async def dialog(self, verb: Verb, name: str | None, digest: str | None) -> str:
        """What is asked before an action. Raises `UnknownVariantError`."""
        one = self._control.variant(name) if name is not None else None
        costs = action_cost(verb, await self.view(), one)
        return self.render("dialog.html", verb=verb, one=one, digest=digest, costs=costs)


def _verbs(one: VariantStatus) -> list[Verb]:
    """The actions that make sense for a variant."""
    has_own = one.kind in ("adapter", "checkpoint")
    found: list[tuple[Verb, bool]] = [
        ("activate", one.state.value != "active" and one.kind != "lora"),
        ("preload", has_own and not one.host_bytes),
        ("pin", has_own and not one.pinned),
        ("unpin", one.pinned),
        ("reload", one.kind != "base"),
        ("rollback", bool(one.previous)),
        ("unregister", one.kind != "base"),
    ]
    return [verb for verb, is_possible in found if is_possible]


def _phases(swap: SwapStatus) -> list[Part]:
    sizes = [(f"{phase} {shown(seconds)}", phase, seconds) for phase, seconds in swap.seconds.items()]
    return parts_of(sizes, sum(swap.seconds.values()))


def _memory(view: View) -> dict[str, Any]:
    """Evaluated weights by digest: names that share a version share its memory."""
    by_digest: dict[str, list[VariantStatus]] = {}
    for one in view.variants:
        if one.host_bytes and one.digest is not None:
            by_digest.setdefault(one.digest, []).append(one)
    shared = [(", ".join(one.name for one in names), names[0]) for names in by_digest.values()]
    sizes = [
        (f"{label} {size(one.host_bytes)}", "frees" if one.evictable_bytes else "stays", one.host_bytes)
        for label, one in shared
    ]
    return {"rows": shared, "bar": parts_of(sizes, view.engine.host_cache_limit)}


def _queue(view: View) -> list[VariantStatus]:
    return [one for one in view.variants if one.waiting or one.running]


def _total(traffic: Sequence[VariantTraffic]) -> dict[str, int]:
    return {key: sum(getattr(one, key) for one in traffic) for key in ("answered", "failed", "generated_tokens")}
