"""One replica of the classifiers: tasks on ONNX Runtime in this process, and a queue of batches for each of them."""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from converters.errors import OptionError, PeanutError
from converters.inference.examples import Example
from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.classify.inference_form import Asked, answer, compute, read_request
from peanut_serve.errors import QueueFullError, RequestBodyError, ServingError, TryLaterError
from peanut_serve.ray.classifiers.engines import open_engines
from peanut_serve.ray.classifiers.settings import ClassifierSettings, Tunables

logger = logging.getLogger("ray.serve")

_THREADS = 2  # so that one batch is prepared, or a task loaded, while another one runs

Item = tuple[Example, int]  # an example, and how many labels are wanted at most
Reply = tuple[int, dict[str, str], bytes]  # status, headers, JSON


class ClassifierReplica:
    """The callable of the Serve deployment `Classifier`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = ClassifierSettings.model_validate(settings)
        self._engines = open_engines(parsed)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="classifier")
        self._queues: dict[str, Any] = {}  # task -> a function of `serve.batch`
        self._loaded: OrderedDict[str, None] = OrderedDict()  # the task used last at the end
        self._counts: dict[str, tuple[int, int]] = {}  # task -> inputs, batches
        self._waiting = 0
        self.name = serve.get_replica_context().replica_id.unique_id
        self._precision, self._tunables = parsed.precision, parsed.tunables

    def reconfigure(self, tunables: dict[str, Any]) -> None:
        """Called by Ray at the start, and when `user_config` has changed."""
        self._tunables = Tunables.model_validate(tunables)
        for queue in self._queues.values():
            queue.set_batch_wait_timeout_s(self._tunables.batch_wait)
        self._unload_oldest()

    async def report(self) -> dict[str, Any]:
        """The name of this replica, what is loaded, and the inputs and batches of each task since it started."""
        counts = {task: {"inputs": count[0], "batches": count[1]} for task, count in sorted(self._counts.items())}
        return {"replica": self.name, "loaded": list(self._loaded), "waiting": self._waiting, "tasks": counts}

    async def answer(self, task: str, content_type: str, body: bytes) -> Reply:
        """The response to a request for a task that there is."""
        try:
            value = await self._answer(task, content_type, body)
        except ServingError as error:
            again = {"retry-after": str(error.retry_after)} if isinstance(error, TryLaterError) else {}
            return error.status, again, _json({"error": str(error), "error_type": type(error).__name__})
        except PeanutError as error:  # of the export; its message names files of this machine
            logger.error("%s cannot run: %s", task, error)
            message = f"{task} cannot run on this server; its log has the reason"
            return 500, {}, _json({"error": message, "error_type": type(error).__name__})
        return 200, {}, _json(value)

    async def _answer(self, task: str, content_type: str, body: bytes) -> Any:
        kind = self._engines[task].find(task).kind
        loop = asyncio.get_running_loop()
        asked: Asked = await loop.run_in_executor(self._pool, read_request, kind, content_type, body)
        count = len(asked.examples)
        if self._waiting and self._waiting + count > self._tunables.most_waiting:
            raise QueueFullError(f"{self._waiting} inputs are waiting, at most {self._tunables.most_waiting} may")
        queue = self._queue(task)
        self._waiting += count
        try:
            found = await asyncio.gather(*(queue((one, asked.top_k)) for one in asked.examples))
        finally:
            self._waiting -= count
        for one in found:
            if isinstance(one, PeanutError):
                raise one
        return answer(kind, asked, found)

    def _queue(self, task: str) -> Callable[[Item], Awaitable[Any]]:
        """The queue of a task. A single one for all would fill a batch with many tasks, and then take it apart."""
        if task not in self._queues:
            engine = self._engines[task]

            async def run_batch(items: list[Item]) -> list[Any]:
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(self._pool, _run, engine, task, items)
                self._note(task, len(items))
                return found

            run_batch.__name__ = task  # by which Ray's metrics call the queue

            size = engine.find(task).batch_size(self._precision)
            self._queues[task] = serve.batch(
                max_batch_size=size, batch_wait_timeout_s=self._tunables.batch_wait if size > 1 else 0.0
            )(run_batch)
        queue: Callable[[Item], Awaitable[Any]] = self._queues[task]
        return queue

    def _note(self, task: str, inputs: int) -> None:
        before, batches = self._counts.get(task, (0, 0))
        self._counts[task] = before + inputs, batches + 1
        self._loaded[task] = None
        self._loaded.move_to_end(task)
        self._unload_oldest()

    def _unload_oldest(self) -> None:
        while len(self._loaded) > self._tunables.loaded:
            oldest, _ = self._loaded.popitem(last=False)
            self._pool.submit(self._engines[oldest].unload, oldest)  # it waits while another task is loaded

    def record_routing_stats(self) -> dict[str, Any]:
        """For the router: the tasks that are loaded. Ray sends this to the front when it has changed."""
        return {"resident": sorted(self._loaded), "slots": self._tunables.loaded}


def _run(engine: OnnxEngine, task: str, items: list[Item]) -> list[Any]:
    """What the model gives for each example, or the error that it has."""
    try:
        return compute(engine, task, [example for example, _ in items], max(top_k for _, top_k in items))
    except OptionError as error:
        if len(items) == 1:
            return [RequestBodyError(str(error))]
        return [one for item in items for one in _run(engine, task, [item])]  # one of them is to blame
    except PeanutError as error:
        return [error] * len(items)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
