"""The metrics of all replicas on one page, each sample with a label `replica`.

Each replica parses and labels its own: the front, through which all requests go, only joins the families.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from peanut_serve.ray.fleet.asking import Entry, ask_all
from peanut_serve.tenants.usage import REFUSED
from peanut_serve.tenants.watched import KEYS_CURRENT

logger = logging.getLogger("ray.serve")

LABEL = "replica"
_THEIRS = "exported_replica"  # a label of that name that a sample has already, as Prometheus renames it
_FRONT = "front"  # in the place of a replica
_UP = "peanut_replica_up"
_HELP = f"# HELP {_UP} 1 if a replica has answered, 0 if it has not, or was lost in the last minutes.\n"
_WITHIN = 5.0  # seconds that a replica has
_FRESH = 1.0  # seconds for which a page is used again: the route needs no key
_REMEMBERED, _MOST_LOST = 600.0, 64  # seconds, and replicas, for which a lost one is shown

Families = dict[str, tuple[str, str]]  # name -> HELP and TYPE, samples


def labelled(page: str, replica: str) -> Families:
    """The families of a page of metrics, with the replica in the labels. Raises `ValueError` for another text."""
    return {family.name: _rendered(family, replica) for family in text_string_to_metric_families(page)}


def _rendered(family: Metric, replica: str) -> tuple[str, str]:
    labelled = Metric(family.name, family.documentation, family.type, family.unit)
    for sample in family.samples:
        labels = {_THEIRS if name == LABEL else name: value for name, value in sample.labels.items()}
        labelled.samples.append(sample._replace(labels={**labels, LABEL: replica}))
    text = generate_latest(cast(CollectorRegistry, _Families([labelled]))).decode()
    description, type_, samples = text.split("\n", 2)
    return f"{description}\n{type_}\n", samples


@dataclass(frozen=True)
class _Families:
    """What `generate_latest` needs of a registry."""

    families: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        """See `CollectorRegistry`."""
        return self.families


def joined(pages: Iterable[Mapping[str, tuple[str, str]]], up: Mapping[str, bool]) -> str:
    """One page of the families of several replicas: HELP and TYPE once, then the samples of all.

    Samples of a family that has another type at an earlier replica are left out, as no page can hold both.
    """
    headers: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        for name, (header, lines) in page.items():
            if _type(headers.setdefault(name, header)) == _type(header):
                samples.setdefault(name, []).append(lines)
            else:
                logger.warning("the replicas have different types of the metric %s", name)
    states = "".join(f'{_UP}{{{LABEL}="{replica}"}} {float(is_up)}\n' for replica, is_up in sorted(up.items()))
    return f"{_HELP}# TYPE {_UP} gauge\n{states}" + "".join(
        header + "".join(samples[name]) for name, header in headers.items()
    )


def _type(header: str) -> str:
    return header.splitlines()[1]


class JointMetrics:
    """The page of a fleet.

    Args:
        engines: the replicas.
        has_tenants: whether the front has a keys file, and so metrics of its own.
    """

    def __init__(self, engines: DeploymentHandle[Any], has_tenants: bool = False) -> None:
        self._engines = engines
        # named here, not in the module of the front, whose globals Ray copies
        self._own: Sequence[Collector] = (REFUSED, KEYS_CURRENT) if has_tenants else ()
        self._seen: dict[str, float] = {}  # replica -> when it answered last
        self._page, self._made, self._making = "", 0.0, asyncio.Lock()

    async def page(self) -> str:
        """The metrics of all replicas that answer in time, and which do not."""
        async with self._making:
            if not self._page or time.monotonic() - self._made > _FRESH:
                self._page = self._join(await self._ask())
                self._made = time.monotonic()
            return self._page

    async def _ask(self) -> list[Entry]:
        try:
            return await ask_all(self._engines, "metrics", within=_WITHIN)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("no replica told its metrics: %s", type(error).__name__)
            return []

    def _join(self, entries: Sequence[Entry]) -> str:
        now = time.monotonic()
        told = {entry["replica"]: entry.get("families") for entry in entries if entry["replica"] is not None}
        self._seen |= {replica: now for replica, families in told.items() if families is not None}
        lost = [name for name, seen in self._seen.items() if name not in told and now - seen < _REMEMBERED]
        kept = sorted(lost, key=self._seen.__getitem__)[-_MOST_LOST:]
        self._seen = {name: seen for name, seen in self._seen.items() if name in told or name in kept}
        up = {**dict.fromkeys(kept, False), **{name: families is not None for name, families in told.items()}}
        pages = [families for families in told.values() if families is not None]
        own = [metric for collector in self._own for metric in collector.collect()]
        return joined([*pages, {metric.name: _rendered(metric, _FRONT) for metric in own}], up)
