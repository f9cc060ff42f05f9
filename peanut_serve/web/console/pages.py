"""What the pages show, rendered: sections of the live page, dialogs, the login."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from converters.errors import MissingDependencyError
from peanut_serve.web.console.actions import LABELS, Verb
from peanut_serve.web.console.costs import View, action_cost, shown, size
from peanut_serve.web.schema import Control, SwapStatus, VariantStatus, VariantTraffic

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
except ImportError as error:
    raise MissingDependencyError(f"the console needs jinja2 ({error}): pip install 'peanut-serve[console]'") from None

SECTIONS = ("engine", "queue", "variants", "memory", "swaps", "traffic", "versions")
_WIDTH = 1000  # units of a bar's width
_FRESH_SECONDS = 1.0  # for which all open pages share what was rendered
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


@dataclass(frozen=True)
class Part:
    """A part of a bar, in units of `_WIDTH`."""

    label: str
    kind: str
    start: float
    width: float


def parts_of(sizes: Sequence[tuple[str, str, float]], whole: float) -> list[Part]:
    """The parts of a bar, one after another.

    Args:
        sizes: label, kind and size of each.
        whole: size of the whole bar.
    """
    found, start = [], 0.0
    for label, kind, amount in sizes:
        width = _WIDTH * amount / whole if whole > 0 else 0.0
        found.append(Part(label, kind, start, width))
        start += width
    return found


class Pages:
    """Renders what a control says.

    Args:
        control: the server.
        drain_seconds: after which a swap aborts running requests.
    """

    def __init__(self, control: Control, drain_seconds: float) -> None:
        self._control, self._drain_seconds = control, drain_seconds
        self._sections: dict[str, str] = {}
        self._rendered_at = 0.0
        self._templates = Environment(
            loader=PackageLoader("peanut_serve.web.console"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"size": size, "seconds": shown, "ago": _ago, "clock": _clock}
        self._templates.globals |= {
            "labels": LABELS, "paths": _PATHS, "causes": _CAUSES, "outcomes": _OUTCOMES, "bar_width": _WIDTH
        }  # fmt: skip

    async def view(self) -> View:
        """The server now."""
        control = self._control
        return View(control.engine(), await control.variants(), control.swaps(), self._drain_seconds)

    def login(self, error: str | None = None) -> str:
        """The page with the form for the key."""
        return self._render("login.html", error=error)

    async def page(self, token: str, is_read_only: bool = False) -> str:
        """The whole page, for a session with this token, that may perhaps change nothing."""
        facts = {"names": [one.name for one in (await self.view()).variants], "is_read_only": is_read_only}
        return self._render("page.html", token=token, sections=await self.sections(is_new=True), **facts)

    async def sections(self, is_new: bool = False) -> dict[str, str]:
        """The live sections, by name: rendered now if `is_new`, and otherwise of the last second.

        They are rendered in a thread, as the loop is that of the server of completions.
        """
        if not is_new and self._sections and time.monotonic() - self._rendered_at < _FRESH_SECONDS:
            return self._sections
        view, traffic = await self.view(), await self._control.traffic()
        facts: dict[str, Any] = {
            "engine": view.engine,
            "variants": view.variants,
            "swaps": [(swap, _phases(swap)) for swap in view.swaps],
            "traffic": traffic,
            "memory": _memory(view),
            "verbs": {one.name: _verbs(one) for one in view.variants},
            "queue": _queue(view),
            "total": _total(traffic),
        }

        def render() -> dict[str, str]:
            return {name: self._render(f"sections/{name}.html", **facts) for name in SECTIONS}

        self._sections, self._rendered_at = await asyncio.to_thread(render), time.monotonic()
        return self._sections

    async def dialog(self, verb: Verb, name: str | None, digest: str | None) -> str:
        """What is asked before an action. Raises `UnknownVariantError`."""
        one = self._control.variant(name) if name is not None else None
        costs = action_cost(verb, await self.view(), one)
        return self._render("dialog.html", verb=verb, one=one, digest=digest, costs=costs)

    def _render(self, template: str, **facts: Any) -> str:
        return self._templates.get_template(template).render(**facts)


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


def _ago(moment: datetime | None) -> str:
    if moment is None:
        return "never"
    seconds = max(0, int((datetime.now(timezone.utc) - moment).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return "just now" if seconds < 10 else f"{seconds // 10 * 10} s ago"  # so that a page at rest does not change


def _clock(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
