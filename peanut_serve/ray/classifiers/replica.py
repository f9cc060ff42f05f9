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
from peanut_serve.classify.hugging_face import Question, ask_of, inputs_of, read_question, write_answers
from peanut_serve.classify.serving.answering import Ask, Result, answer, check_ask
from peanut_serve.classify.serving.limits import Limits
from peanut_serve.classify.serving.preparing import Preparer, prepare_inputs
from peanut_serve.classify.serving.rows import apart, together
from peanut_serve.classify.tasks import OnnxTask
from peanut_serve.errors import (
    QueueFullError,
    RequestBodyError,
    RequestTooLargeError,
    ServingError,
    TryLaterError,
)
from peanut_serve.ray.classifiers.engines import open_engines
from peanut_serve.ray.classifiers.settings import ClassifierSettings, Tunables

logger = logging.getLogger("ray.serve")

_LIMITS = Limits()
_THREADS = 2  # so that one batch is prepared, or a task loaded, while another one runs

Item = tuple[Example, Ask]  # an input, and how its answer is wanted
Reply = tuple[int, dict[str, str], bytes]  # status, headers, JSON


class ClassifierReplica:
    """The callable of the Serve deployment `Classifier`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = ClassifierSettings.model_validate(settings)
        self._engines = open_engines(parsed)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="classifier")
        self._preparers: dict[str, Preparer] = {}
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
            return 200, {}, await self._answer(self._engines[task].find(task), content_type, body)
        except ServingError as error:
            again = {"retry-after": str(error.retry_after)} if isinstance(error, TryLaterError) else {}
            return error.status, again, _json({"error": str(error), "error_type": type(error).__name__})
        except PeanutError as error:  # of the export; its message names files of this machine
            logger.error("%s cannot run: %s", task, error)
            message = f"{task} cannot run on this server; its log has the reason"
            return 500, {}, _json({"error": message, "error_type": type(error).__name__})

    async def _answer(self, task: OnnxTask, content_type: str, body: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        question, items = await loop.run_in_executor(self._pool, _read, task, content_type, body)
        if self._waiting and self._waiting + len(items) > self._tunables.most_waiting:
            raise QueueFullError(f"{self._waiting} inputs are waiting, at most {self._tunables.most_waiting} may")
        queue = self._queue(task.name)
        self._waiting += len(items)
        try:
            found = await asyncio.gather(*(queue(item) for item in items))
        finally:
            self._waiting -= len(items)
        for one in found:
            if isinstance(one, PeanutError):
                raise one
        return write_answers(task.kind, question, found)

    def _queue(self, task: str) -> Callable[[Item], Awaitable[Any]]:
        """The queue of a task. A single one for all would fill a batch with many tasks, and then take it apart."""
        if task not in self._queues:
            engine = self._engines[task]

            async def run_batch(items: list[Item]) -> list[Any]:
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(self._pool, self._run, engine, task, items)
                self._note(task, len(items))
                return found

            run_batch.__name__ = task  # by which Ray's metrics call the queue

            size = engine.find(task).batch_size(self._precision)
            self._queues[task] = serve.batch(
                max_batch_size=size, batch_wait_timeout_s=self._tunables.batch_wait if size > 1 else 0.0
            )(run_batch)
        queue: Callable[[Item], Awaitable[Any]] = self._queues[task]
        return queue

    def _run(self, engine: OnnxEngine, task: str, items: list[Item]) -> list[Result | PeanutError]:
        """The answer to each input, or the error that it has."""
        try:
            loaded, preparer = engine.load(task), self._preparers.get(task)
            if preparer is None:
                preparer = self._preparers[task] = prepare_inputs(loaded.task, _LIMITS)
            prepared = [preparer.prepare(example, ask.truncate) for example, ask in items]
            parts = [one.arrays for one in prepared]
            rows = apart(loaded.run_all(together(parts, preparer.pad_id)), parts, loaded.task.kind)
        except OptionError as error:
            if len(items) == 1:
                return [RequestBodyError(str(error))]
            return [one for item in items for one in self._run(engine, task, [item])]  # one of them is to blame
        except PeanutError as error:
            return [error] * len(items)
        asks = [ask for _, ask in items]
        return [answer(loaded.task, *each) for each in zip(rows, asks, prepared, strict=True)]

    def _note(self, task: str, inputs: int) -> None:
        before, batches = self._counts.get(task, (0, 0))
        self._counts[task] = before + inputs, batches + 1
        self._loaded[task] = None
        self._loaded.move_to_end(task)
        self._unload_oldest()

    def _unload_oldest(self) -> None:
        while len(self._loaded) > self._tunables.loaded:
            oldest, _ = self._loaded.popitem(last=False)
            self._preparers.pop(oldest, None)
            self._pool.submit(self._engines[oldest].unload, oldest)  # it waits while another task is loaded

    def record_routing_stats(self) -> dict[str, Any]:
        """For the router: the tasks that are loaded. Ray sends this to the front when it has changed."""
        return {"resident": sorted(self._loaded), "slots": self._tunables.loaded}


def _read(task: OnnxTask, content_type: str, body: bytes) -> tuple[Question, list[Item]]:
    """What a request asks of a task. Raises `RequestBodyError` or `RequestTooLargeError`."""
    question = read_question(body, content_type)
    if not 1 <= len(question.inputs) <= _LIMITS.max_inputs:
        raise RequestTooLargeError(f"there are {len(question.inputs)} inputs; expected 1 to {_LIMITS.max_inputs}")
    try:
        ask = ask_of(question, task)
        check_ask(task, ask)
        return question, [(one, ask) for one in inputs_of(question, task)]
    except OptionError as error:
        raise RequestBodyError(str(error)) from None


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
