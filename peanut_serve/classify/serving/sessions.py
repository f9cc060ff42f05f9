"""The versions that are open: sessions, adapters and preprocessors, in as much memory as they may have."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from weakref import WeakValueDictionary

from converters.errors import MissingDependencyError, PeanutError
from converters.inference.session import Session
from peanut_serve.classify.loaded import LoadedTask, load_task
from peanut_serve.classify.serving.limits import Limits
from peanut_serve.classify.serving.preparing import Preparer, prepare_inputs
from peanut_serve.classify.serving.version import FileHashes, State, TaskVersion
from peanut_serve.errors import BeingWrittenError, EngineDownError, VariantError, VariantInUseError

logger = logging.getLogger("peanut_serve.classify")

_PATIENCE = 30.0  # seconds until a lease ends, where everything that is open is being used


@dataclass(eq=False)
class OpenTask:
    """A version that can run.

    Attributes:
        version: what is open.
        loaded: its graph and adapter.
        preparer: turns inputs into arrays.
        uses: leases: requests that it must stay open for.
        last_used: when the last lease began.
    """

    version: TaskVersion
    loaded: LoadedTask
    preparer: Preparer
    uses: int = 0
    last_used: float = 0.0

    @property
    def batches(self) -> bool:
        """Whether a row gives in a batch what it gives alone."""
        return self.loaded.task.batch_size(self.version.precision) > 1


@dataclass(frozen=True)
class OpenFacts:
    """What is open of a version.

    Attributes:
        version: what is open.
        uses: requests that it must stay open for.
        frees: bytes that closing it would free now: none while it is used, and those of its graph if no other version
            has it.
        shares: names of the other versions with the same graph.
    """

    version: TaskVersion
    uses: int
    frees: int
    shares: tuple[str, ...]


@dataclass(eq=False)
class _Graph:
    session: Session
    nbytes: int


class Sessions:
    """Opens versions on first use, and evicts those that were not used for longest. Thread-safe.

    The sizes are those of the files. ONNX Runtime maps external data, and copies what it rearranges for its kernels.

    Args:
        limits: of which `memory`, `threads`, `max_pixels` and `max_characters` matter here.
        hashes: of files.
    """

    def __init__(self, limits: Limits, hashes: FileHashes) -> None:
        self._limits, self._hashes = limits, hashes
        self._changed = Condition()
        self._open: dict[TaskVersion, OpenTask] = {}
        self._graphs: dict[State, _Graph] = {}
        self._latest: dict[str, TaskVersion] = {}
        self._preparers: WeakValueDictionary[str, Preparer] = WeakValueDictionary()
        self.evictions = 0

    @property
    def nbytes(self) -> int:
        """Size of the graphs and adapters that are open."""
        with self._changed:
            return self._size()

    @property
    def open_graphs(self) -> int:
        """The number of sessions."""
        return len(self._graphs)

    def open_names(self) -> set[str]:
        """The names whose versions are open."""
        with self._changed:
            return {version.name for version in self._open}

    def facts(self) -> list[OpenFacts]:
        """What is open, by name."""
        with self._changed:
            return [self._facts(task) for task in sorted(self._open.values(), key=lambda one: one.version.name)]

    def _facts(self, task: OpenTask) -> OpenFacts:
        version = task.version
        shares = tuple(sorted(one.name for one in self._open if one.graph == version.graph and one is not version))
        size = version.adapter_bytes + (0 if shares else version.graph_bytes)
        return OpenFacts(version, task.uses, 0 if task.uses else size, shares)

    def evict(self, name: str) -> None:
        """Close what is open of a name; its next request opens it again.

        Raises `VariantInUseError` if requests use it.
        """
        with self._changed:
            found = [task for task in self._open.values() if task.version.name == name]
            if uses := sum(task.uses for task in found):
                raise VariantInUseError(f"{name} is used by {uses} requests; try again when they are answered")
            for task in found:
                self._close(task.version)
            self._changed.notify_all()

    @contextmanager
    def lease(self, version: TaskVersion) -> Iterator[OpenTask]:
        """As `acquire` and `release`; opens the version if it is not open, and so blocks."""
        found = self.acquire(version) or self.open(version)
        try:
            yield found
        finally:
            self.release(found)

    def acquire(self, version: TaskVersion) -> OpenTask | None:
        """Lease a version if it is open; it is not evicted until it is released."""
        with self._changed:
            found = self._open.get(version)
            if found is not None:
                found.uses += 1
                found.last_used = time.monotonic()
            return found

    def release(self, task: OpenTask) -> None:
        """End a lease. A version whose name has moved on is closed with its last one."""
        with self._changed:
            task.uses -= 1
            if not task.uses and self._latest.get(task.version.name) is not task.version:
                self._close(task.version)
            self._changed.notify_all()

    def open(self, version: TaskVersion) -> OpenTask:
        """Check the files of a version, open it, and lease it. Not more than one thread may call this at a time.

        Raises:
            VariantError: it cannot be opened, or needs more memory than all may have. The same is raised for this
                version from now on.
            BeingWrittenError: its files have been replaced; the name has a new version.
            EngineDownError: there is no memory for it now.
        """
        if (found := self.acquire(version)) is not None:
            return found
        if version.failure:
            raise version.failure[0]
        self._make_room(version)
        try:
            loaded, preparer = self._load(version)
        except MissingDependencyError:
            raise
        except PeanutError as error:
            if not version.is_current:
                raise BeingWrittenError(f"the files of {version.name} are being replaced; try again") from None
            version.failure.append(VariantError(f"{version.name} cannot be served: {error}"))
            raise version.failure[0] from None
        if not version.is_current:  # what was opened need not be what was hashed
            raise BeingWrittenError(f"the files of {version.name} are being replaced; try again")
        with self._changed:
            self._latest[version.name] = version
            for old in [one for one, task in self._open.items() if one.name == version.name and not task.uses]:
                self._close(old)
            self._graphs.setdefault(version.graph, _Graph(loaded.session, version.graph_bytes))
            task = self._open[version] = OpenTask(version, loaded, preparer, 1, time.monotonic())
        logger.info("opened %s, digest %s", version.name, version.digest)
        return task

    def _load(self, version: TaskVersion) -> tuple[LoadedTask, Preparer]:
        task, known = version.task, self._graphs.get(version.graph)
        files: dict[Path, str] = self._hashes.of(version.files)
        sessions = {task.model(version.precision): known.session} if known else {}
        loaded = load_task(task, version.precision, files, sessions, self._limits.threads)
        preparer = self._preparers.get(version.inputs)
        if preparer is None:
            preparer = self._preparers[version.inputs] = prepare_inputs(task, self._limits)
        return loaded, preparer

    def _make_room(self, version: TaskVersion) -> None:
        """Evict until a version fits; wait for leases to end if need be."""
        limit, until = self._limits.memory, time.monotonic() + _PATIENCE
        needed = version.graph_bytes + version.adapter_bytes
        if needed > limit:
            raise VariantError(f"{version.name} needs {_mib(needed)}, more than --memory {_mib(limit)}")
        with self._changed:
            while True:
                needed = version.adapter_bytes + (0 if version.graph in self._graphs else version.graph_bytes)
                if self._size() + needed <= limit:
                    return
                idle = [task for task in self._open.values() if not task.uses]
                if idle:
                    self._close(min(idle, key=lambda task: task.last_used).version)
                    self.evictions += 1
                elif not self._changed.wait(until - time.monotonic()):
                    raise EngineDownError(
                        f"{version.name} needs {_mib(needed)}, and other tasks use all of --memory {_mib(limit)}"
                    )

    def _size(self) -> int:
        graphs = sum(graph.nbytes for graph in self._graphs.values())
        return graphs + sum(version.adapter_bytes for version in self._open)

    def _close(self, version: TaskVersion) -> None:
        """Forget a version, and its graph if no other uses it."""
        if self._open.pop(version, None) is not None:
            logger.info("closed %s, digest %s", version.name, version.digest)
            if all(other.graph != version.graph for other in self._open):
                self._graphs.pop(version.graph, None)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}MiB"
