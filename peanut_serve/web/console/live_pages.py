"""Pages that show a server, rendered: a login, and one page whose sections are kept current."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from converters.errors import MissingDependencyError

try:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
except ImportError as error:
    raise MissingDependencyError(f"the console needs jinja2 ({error}): pip install 'peanut-serve[console]'") from None

_OWN = "peanut_serve.web.console"
_WIDTH = 1000  # units of a bar's width
_FRESH_SECONDS = 1.0  # for which all open pages share what was rendered


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


class LivePages(ABC):
    """The pages of one server.

    Args:
        titles: of the sections, by their names, which are those of their templates in `sections/`.
        names: what the templates know besides the facts.
        package: whose templates are taken before those of the console; its `page.html` extends `base.html`.
    """

    def __init__(self, titles: Mapping[str, str], names: Mapping[str, Any], package: str = _OWN) -> None:
        self._titles = titles
        self._sections: dict[str, str] = {}
        self._rendered_at = 0.0
        self._templates = Environment(
            loader=ChoiceLoader([PackageLoader(one) for one in dict.fromkeys((package, _OWN))]),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"size": size, "seconds": shown, "ago": _ago, "clock": _clock}
        self._templates.globals |= {"titles": titles, "bar_width": _WIDTH, **names}

    @abstractmethod
    async def facts(self) -> dict[str, Any]:
        """What the sections show now."""

    @abstractmethod
    async def names(self) -> list[str]:
        """Whom the playground can ask."""

    def login(self, error: str | None = None) -> str:
        """The page with the form for the key."""
        return self.render("login.html", error=error)

    async def page(self, token: str, is_read_only: bool = False) -> str:
        """The whole page, for a session with this token, that may perhaps change nothing."""
        facts = {"names": await self.names(), "is_read_only": is_read_only}
        return self.render("page.html", token=token, sections=await self.sections(is_new=True), **facts)

    async def sections(self, is_new: bool = False) -> dict[str, str]:
        """The live sections, by name: rendered now if `is_new`, and otherwise of the last second.

        They are rendered in a thread, as the loop is that of the server of requests.
        """
        if not is_new and self._sections and time.monotonic() - self._rendered_at < _FRESH_SECONDS:
            return self._sections
        facts = await self.facts()

        def render() -> dict[str, str]:
            return {name: self.render(f"sections/{name}.html", **facts) for name in self._titles}

        self._sections, self._rendered_at = await asyncio.to_thread(render), time.monotonic()
        return self._sections

    def render(self, template: str, **facts: Any) -> str:
        """The text of a template."""
        return self._templates.get_template(template).render(**facts)


def shown(seconds: float) -> str:
    """A duration as people read it."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def size(count: int) -> str:
    """A number of bytes as people read it."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


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
