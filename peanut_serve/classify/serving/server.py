"""Answers requests for the tasks of ONNX folders: the interface of programs, which the HTTP application uses too."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from converters.errors import PeanutError
from converters.inference.examples import Example
from converters.inference.session import Arrays
from peanut_serve.classify.deadline import within
from peanut_serve.classify.serving.answering import Ask, Result, answer, check_ask
from peanut_serve.classify.serving.batching import Batcher, Job, Outputs
from peanut_serve.classify.serving.finding import Finder
from peanut_serve.classify.serving.library import Library
from peanut_serve.classify.serving.limits import Limits
from peanut_serve.classify.serving.metrics import Metrics
from peanut_serve.classify.serving.preparing import Prepared, split_rows
from peanut_serve.classify.serving.results import Answered, Inferred
from peanut_serve.classify.serving.sessions import OpenTask, Sessions
from peanut_serve.classify.serving.version import TaskVersion
from peanut_serve.classify.tasks import OnnxTask
from peanut_serve.errors import (
    EngineDownError,
    QueueFullError,
    RequestTooLargeError,
    ServingError,
)
from peanut_serve.tenants.visits import take_inputs

logger = logging.getLogger("peanut_serve.classify")

_T = TypeVar("_T")
# the inputs of a request, and how answers are wanted
Make = Callable[[OnnxTask], tuple[Sequence[Example], Ask]]
_LOOK = 0.05
_LARGE = 4096  # numbers that are written beside the loop


class TaskServer:
    """Serves tasks by name. For one event loop; `async with` it.

    Args:
        folders: exports, and folders of exports.
        precision: of the graphs that a name stands for.
        limits: what clients may take.

    Attributes:
        library: the names.
        sessions: what is open.
        metrics: of this server.
        is_ready: whether further requests should be sent here; set it to False some time before it stops.

    Raises the errors of `Library`.
    """

    def __init__(self, folders: Sequence[Path], *, precision: str = "fp32", limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.library = Library(folders, precision)
        self.sessions = Sessions(self.limits, self.library.hashes)
        self.metrics = Metrics()
        self.is_ready = True
        self._inputs, self._submitted, self._is_stopped = 0, 0, False
        self._batcher = Batcher(
            self.limits.max_batch,
            self.limits.max_delay,
            lambda version, rows, seconds: self.metrics.observe_run(version.name, rows, seconds),
            lambda: self._inputs > self._submitted,
        )
        self._preparing = ThreadPoolExecutor(self.limits.preparing, "prepare")
        self._finder = Finder(self.library, self.sessions, self._preparing)

    async def __aenter__(self) -> "TaskServer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Admit nothing more, answer what was admitted, then end the threads."""
        self.is_ready, self._is_stopped = False, True
        until = time.monotonic() + self.limits.wait_seconds
        while self._inputs and time.monotonic() < until:
            await asyncio.sleep(_LOOK)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._finder.close()
        self._preparing.shutdown()
        self._batcher.close()

    @property
    def waiting(self) -> int:
        """Inputs that are being prepared, wait, or run."""
        return self._inputs

    async def predict(
        self, name: str, inputs: Sequence[Example], ask: Ask | None = None, digest: str | None = None
    ) -> Answered:
        """Answer for images and sounds (content of files), texts, or pairs of texts.

        Args:
            name: of a task.
            inputs: what to answer for; a path is refused.
            ask: how answers are wanted.
            digest: of the version that has to answer; by default the current one.

        Raises:
            UnknownVariantError: there is no such task, or it is at another version.
            VariantError: its files are broken.
            OptionError: an input cannot be used.
            RequestTooLargeError, QueueFullError, EngineDownError: there are too many inputs, or too much waits.
        """
        return await self.predict_with(name, len(inputs), lambda task: (inputs, ask or Ask()), digest)

    async def predict_with(self, name: str, count: int, make: Make, digest: str | None = None) -> Answered:
        """As `predict`, for a request that cannot be understood without the task.

        Args:
            name: of a task.
            count: how many inputs there are.
            make: the inputs, and how answers are wanted, for the task that was found; called in another thread.
            digest: as in `predict`.
        """

        def prepare(task: OpenTask) -> tuple[Ask, list[Prepared]]:
            inputs, ask = make(task.loaded.task)
            check_ask(task.loaded.task, ask)
            return ask, [task.preparer.prepare(one, ask.truncate) for one in inputs]

        async def answered() -> Answered:
            """The answer of the version that the name stands for now."""
            async with self._finder.lease(name, digest, prepare) as (task, (ask, prepared)):
                rows = await self._run(task, [one.arrays for one in prepared])
                own = task.loaded.task

                def answers() -> list[Result]:
                    return [answer(own, row, ask, one) for row, one in zip(rows, prepared, strict=True)]

                is_slow = prepared[0].spans is not None  # tokens, or even pairs of them, are looked at one by one
                return Answered(task.version, await self._in_thread(answers) if is_slow else answers())

        return await self._admitted(count, answered())

    async def infer(self, name: str, arrays: Arrays, digest: str | None = None) -> Inferred:
        """Run the graph of a task on arrays that a client prepared. Takes and raises what `predict` does."""
        count = max((len(array) for array in arrays.values() if array.ndim), default=0)

        async def inferred() -> Inferred:
            async with self._finder.lease(name, digest, lambda one: one.preparer.check(arrays)) as (task, _):
                size = self.limits.max_batch if task.batches else 1
                found = await self._run(task, split_rows(arrays, size))
                rows = [[one[i : i + 1] for one in part] for part in found for i in range(len(part[0]))]
                return Inferred(task.version, rows)

        return await self._admitted(count, inferred())

    async def outputs(self, name: str, inputs: Sequence[Example], digest: str | None = None) -> Inferred:
        """The outputs of the graph for images or texts. Takes and raises what `predict` does."""

        def prepare(task: OpenTask) -> list[dict[str, NDArray[Any]]]:
            return [task.preparer.row(one) for one in inputs]

        async def inferred() -> Inferred:
            async with self._finder.lease(name, digest, prepare) as (task, rows):
                return Inferred(task.version, await self._run(task, rows))

        return await self._admitted(len(inputs), inferred())

    async def version(self, name: str, digest: str | None = None) -> TaskVersion:
        """The version that a name stands for now, open or not. Raises what `predict` does."""
        return await self._finder.version(name, digest)

    async def load(self, name: str, digest: str | None = None) -> TaskVersion:
        """Open a task, so that its next request does not wait for that. Raises what `predict` does."""
        async with self._finder.lease(name, digest, lambda task: task.version) as (_, version):
            return version

    async def close_task(self, name: str) -> None:
        """Close what is open of a task; its next request opens it again. Raises `VariantInUseError`."""
        await self._in_thread(self.sessions.evict, name)

    def queue(self) -> dict[str, int]:
        """How many inputs of each task wait for a run."""
        return self._batcher.waiting()

    async def warm_up(self) -> None:
        """Open one task that can be opened: the first one imports transformers, which takes seconds."""
        for name in await self.names():
            try:
                await self.load(name)
                return
            except PeanutError as error:
                logger.warning("%s", error)

    def exposition(self) -> bytes:
        """The metrics, in the format that Prometheus reads."""
        self.metrics.waiting.set(self._inputs)
        self.metrics.open_bytes.set(self.sessions.nbytes)
        self.metrics.open_graphs.set(self.sessions.open_graphs)
        self.metrics.ready.set(self.is_ready)
        self.metrics.evicted.set(self.sessions.evictions)
        return self.metrics.exposition()

    async def written(self, write: Callable[[], bytes], size: int) -> bytes:
        """Call a function that writes an answer of so many numbers, beside the loop if they are many."""
        return await self._in_thread(write) if size > _LARGE else write()

    async def names(self) -> list[str]:
        """Every task whose files are there."""
        return await self._in_thread(self.library.names)

    async def _admitted(self, inputs: int, answering: Coroutine[Any, Any, _T]) -> _T:
        """Await the answer of a request with so many inputs, or refuse it."""
        try:
            if not 1 <= inputs <= self.limits.max_inputs:
                raise RequestTooLargeError(
                    f"the request has {inputs} inputs; expected 1 to {self.limits.max_inputs}, see --max-inputs"
                )
            if self._is_stopped:
                raise EngineDownError("the server is stopping")
            if self._inputs + inputs > self.limits.max_queue:
                raise QueueFullError(f"{self._inputs} inputs are waiting, the limit is {self.limits.max_queue}")
            give_back = take_inputs(inputs, self.limits.max_queue)
        except ServingError:
            answering.close()
            raise
        self._inputs += inputs
        try:
            return await within(self.limits.wait_seconds, answering)
        except asyncio.TimeoutError:
            raise EngineDownError(f"no answer within {self.limits.wait_seconds:.0f} s; the server is busy") from None
        finally:
            self._inputs -= inputs
            give_back()

    async def _run(self, task: OpenTask, rows: Sequence[Arrays]) -> list[Outputs]:
        jobs = [Job(task, arrays) for arrays in rows]
        count = sum(job.rows for job in jobs)
        self._submitted += count
        waiting = [asyncio.wrap_future(job.outputs) for job in jobs]
        try:
            for job in jobs:
                self._batcher.submit(job)
            return await asyncio.gather(*waiting)
        finally:
            self._submitted -= count
            # of a request that failed or was given up: what has not begun is not run
            for one in waiting:
                one.cancel()

    async def _in_thread(self, call: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, call, *arguments)
