"""A pool of workers that run jobs in order and read ahead; the first failure stops all."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from converters.evaluation.worker import StoppedError, Worker
from converters.files.header import TensorInfo

_SYSTEM_THREAD_SECONDS = 5.0  # at most; it takes milliseconds


class Job(Protocol):
    """Work that one worker does from beginning to end."""

    @property
    def source(self) -> TensorInfo | None:
        """The tensor it reads, if any."""

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to do."""

    def run(self, worker: Worker) -> None:
        """Do it."""


class Pipeline:
    """Workers on `devices`, one for each entry."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._stop = threading.Event()
        self._workers = [Worker(device, self._stop) for device in devices]

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs that are not finished; an exception in one is raised here, after every worker has stopped."""
        jobs = [job for job in jobs if not job.is_finished]
        queue = enumerate(jobs)
        lock = threading.Lock()
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=self._work, args=(worker, queue, lock, jobs, failures))
            for worker in self._workers
        ]
        own_threads = torch.get_num_threads()
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # also when the main thread is interrupted
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
                    _wait_for_system_thread(thread)
            for worker in self._workers:
                worker.close()  # the files it read may be removed next
            self._stop.clear()
            torch.set_num_threads(own_threads)
        if failures:
            raise failures[0]

    def _work(
        self,
        worker: Worker,
        queue: Iterator[tuple[int, Job]],
        lock: threading.Lock,
        jobs: Sequence[Job],
        failures: list[BaseException],
    ) -> None:
        try:
            with worker.active():
                while not self._stop.is_set():
                    with lock:
                        index, job = next(queue, (0, None))
                    if job is None:
                        return
                    ahead = jobs[index + len(self._workers)] if index + len(self._workers) < len(jobs) else None
                    if ahead is not None and ahead.source is not None:
                        worker.reader.prefetch(ahead.source)
                    job.run(worker)
        except StoppedError:
            pass
        except BaseException as error:
            failures.append(error)
            self._stop.set()


def _wait_for_system_thread(thread: threading.Thread) -> None:
    """Wait until the operating system's thread is gone, which is a little after Python's has ended.

    PyTorch has objects of its own in every thread. A process that exits while they are destroyed is aborted by the
    C++ runtime: that happened to one stopped merge in eight.
    """
    task = Path(f"/proc/self/task/{thread.native_id}")
    deadline = time.monotonic() + _SYSTEM_THREAD_SECONDS
    while task.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
