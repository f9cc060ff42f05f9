# ruff: noqa: PTH116
"""A version of a task: what its files say at one moment, identified by a digest."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import CheckpointError, PeanutError
from converters.serving import MANIFEST_NAME, MODEL_CONFIG, hash_file
from peanut_serve.classify.tasks import OnnxTask, read_task
from peanut_serve.errors import BeingWrittenError, UnknownVariantError

# (path, device, inode, size, mtime, ctime) of each file; None in place of the numbers of a file that is missing
State = tuple[tuple[str | int | None, ...], ...]

_TRIES = 3
_COMPANIONS = (".json", ".txt", ".model", ".jinja")  # suffixes of what tokenizers and preprocessors are read from
# of a config: what says nothing about inputs, so that tasks that differ only in it share a preprocessor
_OF_THE_TASK = ("id2label", "label2id", "num_labels", "problem_type", "architectures", "_name_or_path")


def state_of(files: Iterable[Path | str]) -> State:
    """A value that changes when a file is replaced, written to, or removed."""
    return tuple((str(file), *_stat(file)) for file in files)


def _stat(file: Path | str) -> tuple[int | None, ...]:
    try:
        found = os.stat(file)  # for each request, and a Path of each file would take longer
    except OSError:
        return (None,)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class FileHashes:
    """Hashes of files as long as they do not change: tasks share large ones. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int | None, ...], str]] = {}
        self._lock = threading.Lock()

    def hash(self, file: Path) -> str:
        """The xxh3_128 of a file."""
        stat = _stat(file)
        with self._lock:
            known = self._known.get(file)
        if known is not None and known[0] == stat:
            return known[1]
        digest = hash_file(file)
        self.put(file, stat, digest)
        return digest

    def put(self, file: Path, stat: tuple[int | None, ...], digest: str) -> None:
        """Record the hash of a file that had this `stat` before it was read."""
        with self._lock:
            self._known[file] = (stat, digest)

    def of(self, files: Iterable[Path]) -> dict[Path, str]:
        """The hashes of these files; those that are not known yet are computed."""
        return {file: self.hash(file) for file in files}


@dataclass(frozen=True, eq=False)
class TaskVersion:
    """What a name stands for until its files change. Two versions are equal only if they are the same object.

    Attributes:
        name: in requests.
        digest: sha256 of config, labels, graph, weights, adapter, tokenizer and preprocessor, and the precision.
        task: as its config describes it.
        precision: of its graph.
        state: of the files, when they were read.
        graph: identity of the files of its graph: versions with the same one share a session.
        inputs: identity of what prepares inputs: versions with the same one share a preprocessor.
        graph_bytes: size of the graph with its external data.
        adapter_bytes: size of the adapter, if the graph is swappable.
        failure: why it cannot be opened, if that was found.
    """

    name: str
    digest: str
    task: OnnxTask
    precision: str
    state: State
    graph: State
    inputs: str
    graph_bytes: int
    adapter_bytes: int
    failure: list[PeanutError] = field(default_factory=list)

    @property
    def is_current(self) -> bool:
        """Whether the files are those that were read."""
        return state_of(str(path) for path, *_ in self.state) == self.state

    @property
    def files(self) -> list[Path]:
        """The files that a run reads: graph, external data, adapter."""
        return [self.task.path(name) for name in self.task.run_files(self.precision)]


def read_version(name: str, config: Path, precision: str, hashes: FileHashes) -> TaskVersion:
    """The version that is in the folder of a task's config now.

    Raises:
        UnknownVariantError: there is no such config.
        BeingWrittenError: the files change while they are read.
        CheckpointError, OptionError: they are damaged, or there is no graph in this precision.
    """
    for _ in range(_TRIES):
        before = _stat(config)
        if before == (None,):
            raise UnknownVariantError(f"the files of {name} were not found")
        task = read_task(config, name)
        found = _read(name, config, task, precision, hashes)
        if found.state[1][1:] == before and found.is_current:
            return found
    raise BeingWrittenError(f"the files of {name} are being written; try again when they are complete")


def _read(name: str, config: Path, task: OnnxTask, precision: str, hashes: FileHashes) -> TaskVersion:
    folder = config.parent
    run = task.run_files(precision)
    graph = [task.path(one) for one in run if one != task.adapter]
    companions = _companions(folder)
    state = state_of([folder, config, *companions, *(task.path(one) for one in run), *_manifest(folder, task)])
    try:
        beside = {file.name: hashes.hash(file) for file in companions if file != config}
        sizes = {one: task.path(one).stat().st_size for one in run}
    except OSError as error:
        raise CheckpointError(f"{folder}: a file of {name} cannot be read ({error.strerror})") from None
    own = {key: value for key, value in task.config.items() if key not in _OF_THE_TASK}
    facts = [task.config, task.labels, task.kind.record(), task.base, precision, run, beside]
    return TaskVersion(
        name=name,
        digest=_digest(facts),
        task=task,
        precision=precision,
        state=state,
        graph=state_of(graph),
        inputs=_digest([own, task.kind.record(), beside]),
        graph_bytes=sum(size for one, size in sizes.items() if one != task.adapter),
        adapter_bytes=sizes.get(task.adapter or "", 0),
    )


def _companions(folder: Path) -> list[Path]:
    """Tokenizer, preprocessor and other small files that inputs are prepared with; not those of other tasks."""
    try:
        found = sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from None
    return [
        file
        for file in found
        if file.suffix in _COMPANIONS and file.name != MANIFEST_NAME and not file.name.endswith(f".{MODEL_CONFIG}")
    ]


def _manifest(folder: Path, task: OnnxTask) -> list[Path]:
    return [folder / MANIFEST_NAME] if task.adapter is not None else []


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]
