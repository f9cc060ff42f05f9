"""While nothing is asked for: the weights of variants that were used lately, in host memory before they are needed.

That finds what a request would wait for: a new version in a variant's files, and weights that were dropped when
others needed the room. It takes free memory only, and so never drops weights; of the requests that come meanwhile,
one at most waits for an evaluation that it did not need.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from converters.errors import PeanutError
from peanut_serve.swapping import metrics
from peanut_serve.swapping.host_side import Preparation
from peanut_serve.swapping.requests import Usage
from peanut_serve.variants.catalogue import Catalogue
from peanut_serve.variants.host_cache import HostCache

logger = logging.getLogger("vllm.peanut_serve")

_PAUSE_SECONDS = 5.0  # between looks; and the server has to be idle in two in turn
_MOST = 8  # variants that are looked at


class RecentVariants:
    """Prepares variants that were used lately, one at a time.

    Args:
        catalogue: the variants.
        preparation: evaluates them.
        cache: weights in host memory.
        usage: name -> its requests so far.
        is_idle: whether no request runs or waits.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        preparation: Preparation,
        cache: HostCache,
        usage: Mapping[str, Usage],
        is_idle: Callable[[], bool],
    ) -> None:
        self._catalogue, self._preparation, self._cache = catalogue, preparation, cache
        self._usage, self._is_idle = usage, is_idle
        self._failed: dict[str, float] = {}  # name -> its last use when it could not be prepared: not before the next

    async def run(self) -> None:
        """Run until cancelled."""
        was_idle = False
        while True:
            await asyncio.sleep(_PAUSE_SECONDS)
            if (is_idle := self._is_idle()) and was_idle:
                await self.prepare()
            was_idle = is_idle

    async def prepare(self) -> None:
        """Prepare those whose weights are not in host memory, the latest used first, while the server is idle."""
        used = {name: usage.last_used for name, usage in self._usage.items() if usage.last_used is not None}
        for name in sorted(used, key=lambda one: -used[one])[:_MOST]:
            if not self._is_idle():
                return
            if self._catalogue.has(name) and self._failed.get(name) != used[name]:
                await self._prepare(name, used[name])

    async def _prepare(self, name: str, last_used: float) -> None:
        before = self._digest(name)
        was_ready = before is not None and self._cache.get(before) is not None
        try:
            with ExitStack() as holds:
                await self._catalogue.current(name, self._preparation.preparing(name, holds, drops=False))
        except PeanutError as error:
            self._failed[name] = last_used
            logger.info("variant=%s is not prepared ahead: %s", name, error)
            return
        after = self._digest(name)
        if after is not None and self._cache.get(after) is not None and not (was_ready and after == before):
            metrics.PREPARED_AHEAD.inc()
            logger.info("variant=%s digest=%s was prepared ahead", name, after[:12])

    def _digest(self, name: str) -> str | None:
        version = self._catalogue.find(name).version
        return version.digest if version is not None and version.has_own_weights else None
