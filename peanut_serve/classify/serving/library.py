"""The names that requests can use, and the version that each stands for now.

A name is that of a task in an exported folder. `NAME:PRECISION` is the same task in another precision that was
exported beside. Names from requests are looked up in a table and never become paths.
"""

import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import CheckpointError, OptionError, PeanutError
from converters.serving import MODEL_CONFIG
from peanut_serve.classify.serving.version import FileHashes, TaskVersion, read_version
from peanut_serve.classify.tasks import task_configs
from peanut_serve.errors import ServingError, UnknownVariantError, VariantError, shown

logger = logging.getLogger("peanut_serve.classify")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PRECISIONS = ("fp32", "fp16", "int8")
_SHOWN = 10  # names in a message
_RESCAN = 0.5  # seconds between two looks for new tasks


@dataclass(eq=False)
class _Entry:
    """A name, and what was last found in its files."""

    name: str
    config: Path
    precision: str
    version: TaskVersion | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Library:
    """Tasks by name. Thread-safe; every method reads files, so call it outside of an event loop.

    Args:
        folders: exports, and folders whose subfolders are exports. Subfolders may be added while it is used.
        precision: of the graphs that a name without one stands for.

    Attributes:
        hashes: of files.

    Raises:
        CheckpointError: a folder contains no export.
        OptionError: two tasks have the same name, or a name that cannot be in a URL.
    """

    def __init__(self, folders: Sequence[Path], precision: str = "fp32") -> None:
        self.hashes = FileHashes()
        self._folders, self._precision = [folder.absolute() for folder in folders], precision
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._configs: dict[str, Path] = {}
        for folder in self._folders:
            for name, config in _find(folder).items():
                if name in self._configs:
                    raise OptionError(
                        f"{self._configs[name].parent} and {config.parent} both have a task {name}; rename one"
                    )
                if not _NAME.fullmatch(name):
                    raise OptionError(
                        f"{config}: the task {name!r} cannot be served; its name must match {_NAME.pattern}"
                    )
                self._configs[name] = config
        self._scanned = time.monotonic()

    def names(self) -> list[str]:
        """Every name whose files are there, without those of other precisions."""
        self._rescan()
        return sorted(name for name, config in list(self._configs.items()) if config.is_file())

    def current(self, name: str) -> TaskVersion:
        """The version that a name stands for now. If the files have changed since the last call, they are read.

        Raises:
            UnknownVariantError: there is no such task, or its files are gone.
            BeingWrittenError: its files are being written.
            VariantError: they are damaged.
        """
        entry = self._entry(name)
        with entry.lock:
            if entry.version is not None and entry.version.is_current:
                return entry.version
            try:
                entry.version = read_version(name, entry.config, entry.precision, self.hashes)
            except ServingError:
                raise
            except (PeanutError, OSError) as error:
                raise VariantError(f"{name} cannot be served: {error}") from None
            return entry.version

    def reread(self, name: str) -> None:
        """Forget what was found of a name: its files are read and opened anew, even if they did not change."""
        if (entry := self._entries.get(name)) is not None:
            entry.version = None

    def is_known(self, name: str) -> bool:
        """Whether a name has been found, now or earlier. Reads no files."""
        return name in self._entries or name in self._configs

    def found(self) -> dict[str, TaskVersion | None]:
        """Every name with the version that was last found; None if it was never asked for. Reads no files."""
        names = {*self._configs, *self._entries}
        return {name: one.version if (one := self._entries.get(name)) else None for name in sorted(names)}

    def _entry(self, name: str) -> _Entry:
        if (found := self._entries.get(name)) is not None:
            return found
        task, _, precision = name.partition(":")
        if task not in self._configs:
            self._rescan()
        config = self._configs.get(task)
        if config is None or (":" in name and precision not in _PRECISIONS):
            known = sorted(self._configs)
            more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
            raise UnknownVariantError(
                f"there is no task {shown(name)}; the available tasks are {', '.join(known[:_SHOWN])}{more}"
            )
        with self._lock:
            return self._entries.setdefault(name, _Entry(name, config, precision or self._precision))

    def _rescan(self) -> None:
        """Add tasks that are new, at most every half second. Those that are known stay, even without files."""
        with self._lock:
            if time.monotonic() - self._scanned < _RESCAN:
                return
            self._scanned = time.monotonic()
            for folder in self._folders:
                try:
                    found = _find(folder)
                except (PeanutError, OSError) as error:
                    logger.warning("%s: %s", folder, error)
                    continue
                for name, config in found.items():
                    if not _NAME.fullmatch(name) or self._configs.setdefault(name, config) != config:
                        logger.warning(
                            "%s: the task %s is not served; its name is taken or not allowed", config, name
                        )


def _find(folder: Path) -> dict[str, Path]:
    """The config of each task in a folder, or in its subfolders. Raises `CheckpointError` if there are none."""
    try:
        return _tasks(folder)
    except CheckpointError:
        if (folder / MODEL_CONFIG).is_file() or not folder.is_dir():
            raise
    found: dict[str, Path] = {}
    for inside in sorted(folder.iterdir()):
        if not inside.is_dir() or inside.name.startswith("."):
            continue
        try:
            tasks = _tasks(inside)
        except CheckpointError:
            continue
        for name, config in tasks.items():
            if name in found:
                raise OptionError(f"{found[name].parent} and {inside} both have a task {name}; rename one")
            found[name] = config
    if not found:
        raise CheckpointError(
            f"{folder} contains no ONNX export; expected a folder that peanut-merge --format onnx wrote, or a folder "
            "of such folders"
        )
    return found


def _tasks(folder: Path) -> dict[str, Path]:
    """As `task_configs`, but a task that is alone has the name that the folder was given by, which may be a link."""
    found = task_configs(folder)
    alone = folder / MODEL_CONFIG
    return {folder.name: alone} if alone in found.values() else found
