"""Dynamic batching: rows of one version that wait at the same time share a run.

The threads that run graphs form the batches themselves, when they are free: so a batch has all rows that came during
the run before it, and the event loop is not asked between two runs. Whose oldest row is due first is run first. A row
is due when it has waited for `max_delay`; at once if its batch is full, the version takes no others, or no request is
on its way that could join it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from converters.inference.session import Arrays
from peanut_serve.classify.serving.rows import apart, length, together
from peanut_serve.classify.serving.sessions import OpenTask
from peanut_serve.classify.serving.version import TaskVersion
from peanut_serve.errors import EngineDownError

logger = logging.getLogger("peanut_serve.classify")

Outputs = list[NDArray[np.float32]]
# told of each run: the version, its rows, seconds
Observer = Callable[[TaskVersion, int, float], None]

_PADDING = 1.5  # a batch has at most this many times the tokens of its texts


@dataclass(eq=False)
class Job:
    """Rows that belong together.

    Attributes:
        task: a leased version.
        arrays: its inputs.
        outputs: every output of the graph for these rows.
        arrived: when it was submitted.
    """

    task: OpenTask
    arrays: Arrays
    outputs: "Future[Outputs]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(next(iter(self.arrays.values())))


class Batcher:
    """Runs jobs in batches, in threads of its own. Thread-safe.

    Args:
        max_batch: the most rows of a run.
        max_delay: seconds that a row waits for others.
        observe: is told of each run, in the thread that ran it.
        expects: whether further rows are on their way; called in the threads that run graphs.
        runners: threads, each of which has one run at a time.
    """

    def __init__(
        self,
        max_batch: int,
        max_delay: float,
        observe: Observer,
        expects: Callable[[], bool] = lambda: True,
        runners: int = 1,
    ) -> None:
        self._max_batch, self._max_delay, self._observe, self._expects = max_batch, max_delay, observe, expects
        self._changed = threading.Condition()
        self._queues: dict[TaskVersion, deque[Job]] = {}
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"run-{index}", daemon=True) for index in range(runners)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Its `outputs` get the result, or what the run raised. A cancelled one is not run."""
        with self._changed:
            if self._is_closed:
                raise EngineDownError("the server is stopping")
            self._queues.setdefault(job.task.version, deque()).append(job)
            self._changed.notify()

    def waiting(self) -> dict[str, int]:
        """How many rows of each version wait, by its name."""
        with self._changed:
            return {version.name: sum(job.rows for job in queue) for version, queue in self._queues.items() if queue}

    def close(self) -> None:
        """Run what is queued, then end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Run the next batch; whether there was one. Keeps no reference to it, which would keep its session open."""
        batch = self._next()
        running = [job for job in batch or () if job.outputs.set_running_or_notify_cancel()]
        if running:
            self._run(running)
        return batch is not None

    def _next(self) -> list[Job] | None:
        """Wait for the next batch; None when all is done."""
        with self._changed:
            while True:
                due = min(
                    ((self._due(queue), version) for version, queue in self._queues.items()), key=_when, default=None
                )
                if due is None:
                    if self._is_closed:
                        return None
                    self._changed.wait()
                    continue
                wait = due[0] - time.monotonic()
                if wait <= 0 or self._is_closed:
                    return self._take(due[1])
                self._changed.wait(wait)

    def _due(self, queue: deque[Job]) -> float:
        first = queue[0]
        is_full = not first.task.batches or sum(job.rows for job in queue) >= self._max_batch
        return first.arrived + (0.0 if is_full or not self._expects() else self._max_delay)

    def _take(self, version: TaskVersion) -> list[Job]:
        """The oldest job, and the others that are closest to it in length: they need the least padding."""
        queue = self._queues.pop(version)
        batch = [queue.popleft()]
        longest = length(batch[0].arrays)
        rows, tokens = batch[0].rows, batch[0].rows * longest
        for job in sorted(queue, key=lambda one: abs(length(one.arrays) - longest)) if batch[0].task.batches else ():
            own = length(job.arrays)
            padded = max(longest, own) * (rows + job.rows)
            if rows + job.rows <= self._max_batch and padded <= _PADDING * (tokens + own * job.rows):
                batch.append(job)
                rows, tokens, longest = rows + job.rows, tokens + own * job.rows, max(longest, own)
        if rest := deque(job for job in queue if job not in batch):
            self._queues[version] = rest
        return batch

    def _run(self, batch: list[Job]) -> None:
        """Run a batch. If that fails, each job is run alone: one that cannot be run does not fail the others."""
        task, parts = batch[0].task, [job.arrays for job in batch]
        start = time.monotonic()
        try:
            outputs = task.loaded.run_all(together(parts, task.preparer.pad_id))
            found = apart(outputs, parts, task.loaded.task.kind)
        except Exception as error:  # whatever it is, somebody waits for it
            if len(batch) > 1:
                for job in batch:
                    self._run([job])
                return
            batch[0].outputs.set_exception(error)
            return
        self._observe(task.version, sum(job.rows for job in batch), time.monotonic() - start)
        for job, own in zip(batch, found, strict=True):
            job.outputs.set_result(own)


def _when(due: tuple[float, TaskVersion]) -> float:
    return due[0]
