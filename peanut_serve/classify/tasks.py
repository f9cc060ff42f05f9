"""Finds the tasks in a folder that `peanut-merge --format onnx` wrote, with checks that ONNX Runtime omits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import BaseMismatchError, CheckpointError, OptionError, VerificationError
from converters.inference.adapter_file import model_version, read_adapter_file
from converters.inference.kinds import ModelKind, find_kind
from converters.inference.session import LoadedAdapter, Session
from converters.serving import MANIFEST_NAME, MODEL_CONFIG, hash_file, labels_of, read_json

# the values of `converters.outputs.onnx.options.Form`, which is not part of the declared surface
_FORMS = ("merged", "shared", "self-merging", "swappable")
_HAVE_ADAPTERS = ("swappable",)


@dataclass(frozen=True)
class OnnxTask:
    """One task in a folder.

    Attributes:
        name: name of the task; the folder's name if it is the only task.
        folder: folder of its files.
        config: the model's config.
        kind: task, inputs and output of its graph.
        labels: names of its classes; empty for models without classes.
        base: fingerprint of the base it was trained on.
        models: precision -> graph, relative to the folder.
        adapter: its adapter file, if the graph is swappable.
        files: file -> xxh3_128, for all files of the task.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    kind: ModelKind
    labels: tuple[str, ...]
    base: str
    models: Mapping[str, str]
    adapter: str | None
    files: Mapping[str, str]

    @property
    def problem_type(self) -> str | None:
        """`problem_type` as in transformers: whether several labels can apply at once, or outputs are numbers."""
        return self.config.get("problem_type")

    def model(self, precision: str) -> Path:
        """Path of the graph. Raises `OptionError` if there is none in this precision."""
        if precision not in self.models:
            known = ", ".join(self.models)
            raise OptionError(
                f"{self.folder} has {self.name} in {known}, not in {precision}; see peanut-merge --quantize"
            )
        return self.path(self.models[precision])

    def batch_size(self, precision: str) -> int:
        """The most inputs of a run that gives each what it gives alone: one for int8, see `classify.serving`."""
        return 1 if precision == "int8" else self.kind.batch_size

    def path(self, name: str) -> Path:
        """Path of a file of the task. Raises `CheckpointError` if it is outside of the folder, or missing."""
        path = self.folder / name
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except ValueError as error:  # a NUL
            raise CheckpointError(
                f"{self.folder}: {self.name} refers to {name!r}, which is not a valid file name ({error})"
            ) from None
        if not inside:
            raise CheckpointError(f"{self.folder}: {self.name} refers to {name}, which is not in the folder")
        if not path.is_file():
            raise CheckpointError(
                f"{self.folder}: {name} of {self.name} is missing; copy the whole folder, or export again"
            )
        return path

    def run_files(self, precision: str) -> dict[str, str]:
        """The files that a run in this precision reads, with their hashes: graph, external data, adapter.

        Raises `OptionError` if the task does not have this precision, `CheckpointError` if a file is missing.
        """
        self.model(precision)
        others = {model for one, model in self.models.items() if one != precision}
        own = self.files if self.adapter is None else {**self._graph_files(precision), **self.files}
        return {name: digest for name, digest in own.items() if not {name, name.removesuffix("_data")} & others}

    def check_files(self, precision: str, hashes: dict[Path, str]) -> None:
        """Compare the files that a run in this precision reads with their hashes; other precisions may be missing.

        Args:
            precision: one that the task has.
            hashes: hashes computed so far, which this call adds to: tasks share large files.

        Raises:
            VerificationError: a file is not the one that was written.
            CheckpointError: a file, or the manifest, cannot be read.
        """
        for name, digest in self.run_files(precision).items():
            path = self.path(name)
            if path not in hashes:
                hashes[path] = hash_file(path)
            if hashes[path] != digest:
                raise VerificationError(
                    f"{self.folder}: {name} is not the file that was written for {self.name}; export again"
                )

    def _graph_files(self, precision: str) -> dict[str, str]:
        """Hashes of the graph from the folder's manifest: a swappable graph is not among the files of a task."""
        manifest = self.folder / MANIFEST_NAME
        known = read_json(manifest, "manifest").get("files") if manifest.is_file() else None
        model = self.models[precision]
        return {name: known[name] for name in (model, f"{model}_data") if isinstance(known, dict) and name in known}

    def check_graph(self, session: Session) -> None:
        """Raise `BaseMismatchError` if the graph was exported from another base, or does not name its base."""
        found = session.metadata.get("peanut.base")
        if found != self.base:
            raise BaseMismatchError(
                f"{self.folder}: {self.name} was trained on the base {self.base}, but the graph contains {found}; "
                "use the graph of the export it came with"
            )

    def load_adapter(self, session: Session) -> LoadedAdapter | None:
        """Load the adapter that a swappable graph needs; None for other graphs.

        Raises:
            BaseMismatchError: the file is for another base.
            CheckpointError: it is damaged, or the graph lacks its inputs.
        """
        if self.adapter is None:
            return None
        file = self.path(self.adapter)
        loaded = LoadedAdapter(file)
        version, names = read_adapter_file(file)
        if version != model_version(self.base):
            raise BaseMismatchError(
                f"{file} is for another base than {self.name}, which was trained on {self.base}; export it again"
            )
        if extra := sorted(names - set(session.overridable)):
            raise CheckpointError(
                f"{file}: the graph has no input {extra[0]}; it was written for tasks that adapt other modules: "
                "export the tasks of one graph together"
            )
        return loaded


def find_tasks(folder: Path) -> dict[str, OnnxTask]:
    """Find all tasks in a folder, by name.

    Raises `CheckpointError` if the folder is not an ONNX export, or a task in it is damaged.
    """
    return {name: read_task(file, name) for name, file in task_configs(folder).items()}


def task_configs(folder: Path) -> dict[str, Path]:
    """The config of every task in a folder, by name; a task that is alone has the name of the folder.

    Raises `CheckpointError` if the folder is not an ONNX export, or a config cannot be read.
    """
    single = folder / MODEL_CONFIG
    if single.is_file() and "peanut" in read_json(single, "config"):
        return {folder.resolve().name: single}
    found = {
        file.name.removesuffix(f".{MODEL_CONFIG}"): file
        for file in sorted(folder.glob(f"*.{MODEL_CONFIG}"))
        if "peanut" in read_json(file, "config")  # other files with such a name are not ours
    }
    if not found:
        raise CheckpointError(
            f"{folder} contains no ONNX export; expected a folder that peanut-merge --format onnx wrote"
        )
    return found


def read_task(file: Path, name: str) -> OnnxTask:
    """Read a task from its config. Raises `CheckpointError` if that is damaged."""
    config = read_json(file, "config")
    try:
        own = config["peanut"]
        models = {str(precision): str(model) for precision, model in own["models"].items()}
        files = {str(path): str(digest) for path, digest in own["files"].items()}
        base, adapter = str(own["base"]), None if own["adapter"] is None else str(own["adapter"])
        form = own["form"]
        kind = ModelKind.from_record(own["kind"]) if "kind" in own else find_kind(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its section 'peanut' is damaged ({error!r}); export again") from None
    if form not in _FORMS or (form in _HAVE_ADAPTERS) != (adapter is not None):
        raise CheckpointError(
            f"{file}: the form is {form!r} and the adapter {adapter}; expected one of {', '.join(_FORMS)}, and an "
            "adapter only with swappable; export again, or update peanut-serve"
        )
    labels = labels_of(config) if kind.has_labels else None
    rest = {key: value for key, value in config.items() if key != "peanut"}
    return OnnxTask(name, file.parent, rest, kind, tuple(labels or ()), base, models, adapter, files)
