"""Runs tasks on ONNX Runtime, with one session per graph and an adapter chosen for each run.

The adapter is an argument of a run, not a state, so two threads can run two tasks of one graph at the same time.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.errors import OptionError
from converters.inference.examples import Example, Preprocessor
from converters.inference.preprocessing import open_preprocessor
from converters.inference.session import Arrays, Session
from converters.inference.texts import TextPreprocessor
from peanut_serve.classify.answers import Answer, find_answers
from peanut_serve.classify.entities import Entity, find_entities
from peanut_serve.classify.loaded import LoadedTask, load_task
from peanut_serve.classify.predictions import Prediction, predictions
from peanut_serve.classify.tasks import OnnxTask, find_tasks


class OnnxEngine:
    """The tasks of a folder that `peanut-merge --format onnx` wrote.

    Args:
        folder: the exported folder.
        precision: `fp32`, or one that `--quantize` wrote: `fp16`, `int8`.
        threads: threads per run; all cores by default.

    Attributes:
        tasks: name -> task.

    Raises `CheckpointError` if the folder is not an ONNX export.
    """

    def __init__(self, folder: str | Path, *, precision: str = "fp32", threads: int | None = None) -> None:
        self.tasks = find_tasks(Path(folder))
        self._folder, self._precision, self._threads = Path(folder), precision, threads
        self._lock = threading.Lock()  # held while a task is made ready; ready tasks are read without it
        self._hashes: dict[Path, str] = {}
        self._sessions: dict[Path, Session] = {}
        self._ready: dict[str, LoadedTask] = {}
        self._preprocessors: dict[str, Preprocessor] = {}

    def run(self, arrays: Arrays, task: str | None = None) -> NDArray[np.float32]:
        """Run a task's graph and return its first output; see `converters.inference.kinds.ModelKind`.

        Args:
            arrays: inputs by name.
            task: name of the task; optional if the folder has only one.

        Raises:
            OptionError: there is no such task, or not in this precision; or the graph cannot run on the inputs.
            CheckpointError, VerificationError: a file is missing, damaged, or not the one that was written; the
                output has NaN or infinity, or its number of labels differs from the config.
            BaseMismatchError: the graph and the task have different bases.
        """
        return self.run_all(arrays, task)[0]

    def run_all(self, arrays: Arrays, task: str | None = None) -> list[NDArray[np.float32]]:
        """Every output of a task's graph. Takes the arguments of `run`, and raises the same errors."""
        return self.load(task).run_all(arrays)

    def load(self, task: str | None = None) -> LoadedTask:
        """Open and check a task, which its first run would do otherwise. Raises the same errors as `run`."""
        found = self.find(task)
        if ready := self._ready.get(found.name):
            return ready
        with self._lock:
            if found.name not in self._ready:
                loaded = load_task(found, self._precision, self._hashes, self._sessions, self._threads)
                self._sessions[found.model(self._precision)] = loaded.session
                self._ready[found.name] = loaded
            return self._ready[found.name]

    def unload(self, task: str) -> None:
        """Give back the memory of a task; its next run loads it again. Runs that have begun are not disturbed."""
        with self._lock:
            self._ready.pop(task, None)
            self._preprocessors.pop(task, None)
            in_use = {one.session for one in self._ready.values()}
            self._sessions = {model: session for model, session in self._sessions.items() if session in in_use}
            # a file that is read again may be another one then
            graphs = {path for model in self._sessions for path in (model, model.with_name(f"{model.name}_data"))}
            self._hashes = {path: digest for path, digest in self._hashes.items() if path in graphs}

    def find(self, task: str | None) -> OnnxTask:
        """Find a task by name. Raises `OptionError` if it does not exist, or `task` is None and there are several."""
        if task is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        known = ", ".join(self.tasks)
        if task is None:
            raise OptionError(f"{self._folder} has several tasks; choose one: {known}")
        if task not in self.tasks:
            raise OptionError(f"{self._folder} has no task {task}; available: {known}")
        return self.tasks[task]

    def predict(self, examples: Sequence[Example], task: str | None = None, top_k: int = 5) -> list[list[Prediction]]:
        """Predict labels with scores for images, sounds (paths) or texts, best first; a value if there is one label.

        Raises `OptionError` if the task does not classify images, sounds or texts, or an input cannot be read; and
        the errors of `run`.
        """
        found = self.find(task)
        if found.kind.task not in ("image-classification", "audio-classification", "text-classification"):
            raise OptionError(
                f"{found.name} does {found.kind.task}, which has no label for a whole input; use entities() for "
                "token classifiers, answers(), embeddings() or next_tokens() for other models"
            )
        if top_k < 1:
            raise OptionError(f"top_k is {top_k}; expected 1 or more")
        rows = self._logits(found, examples)
        return [predictions(row, found.labels, top_k, found.problem_type) for row in rows]

    def entities(self, texts: Sequence[str], task: str | None = None) -> list[list[Entity]]:
        """Find the parts of texts that a token classifier labels, in order.

        Raises `OptionError` if the task is not a token classifier, or a text is longer than its limit; and the errors
        of `run`.
        """
        found = self.find(task)
        if found.kind.task != "token-classification":
            raise OptionError(
                f"{found.name} does {found.kind.task}, which has no labels for parts of a text; use predict()"
            )
        preprocessor = self._preprocessor(found)
        assert isinstance(preprocessor, TextPreprocessor)
        spans = [preprocessor.spans(text) for text in texts]
        rows = self._logits(found, texts)
        return [
            find_entities(text, row, where, found.labels) for text, row, where in zip(texts, rows, spans, strict=True)
        ]

    def answers(
        self, pairs: Sequence[tuple[str, str]], task: str | None = None, top_k: int = 5
    ) -> list[list[Answer]]:
        """Find the parts of texts that answer a question, best first; the pairs are (question, text).

        Raises `OptionError` if the task does not answer questions, or a pair is longer than its limit; and the errors
        of `run`.
        """
        found, preprocessor = self._texts(task, "question-answering")
        spans = [preprocessor.spans(pair) for pair in pairs]
        rows = self._outputs(found, pairs)
        return [
            find_answers(pair[1], row[0], row[1], where, top_k)
            for pair, row, where in zip(pairs, rows, spans, strict=True)
        ]

    def embeddings(self, texts: Sequence[str], task: str | None = None) -> list[NDArray[np.float32]]:
        """Compute the embeddings (width,) of texts, for models of sentence-transformers.

        Raises `OptionError` if the task is another; and the errors of `run`.
        """
        found, _ = self._texts(task, "sentence-similarity")
        return list(self._logits(found, texts))

    def next_tokens(self, texts: Sequence[str], task: str | None = None, top_k: int = 5) -> list[list[Prediction]]:
        """Predict the token after each text, best first.

        Raises `OptionError` if the task is not a language model; and the errors of `run`.
        """
        found, preprocessor = self._texts(task, "text-generation")
        tokens = []
        for text in texts:
            last = self.run(preprocessor([text]), found.name)[0, -1]
            best = predictions(last, [str(index) for index in range(len(last))], top_k)
            tokens.append([Prediction(preprocessor.token(int(one.label)), one.score) for one in best])
        return tokens

    def _texts(self, task: str | None, wanted: str) -> tuple[OnnxTask, TextPreprocessor]:
        found = self.find(task)
        if found.kind.task != wanted:
            raise OptionError(f"{found.name} does {found.kind.task}, expected a model for {wanted}")
        preprocessor = self._preprocessor(found)
        assert isinstance(preprocessor, TextPreprocessor)
        return found, preprocessor

    def _logits(self, task: OnnxTask, examples: Sequence[Example]) -> Iterator[NDArray[np.float32]]:
        """The logits of each example, computed in batches; those of tokens include rows for padding."""
        return (row[0] for row in self._outputs(task, examples))

    def _outputs(self, task: OnnxTask, examples: Sequence[Example]) -> Iterator[tuple[NDArray[np.float32], ...]]:
        """The outputs of each example, as `_logits`."""
        preprocessor, size = self._preprocessor(task), task.batch_size(self._precision)
        for start in range(0, len(examples), size):
            yield from zip(*self.run_all(preprocessor(examples[start : start + size]), task.name), strict=True)

    def _preprocessor(self, task: OnnxTask) -> Preprocessor:
        if known := self._preprocessors.get(task.name):
            return known
        with self._lock:
            if task.name not in self._preprocessors:
                self._preprocessors[task.name] = open_preprocessor(task.folder, task.kind, task.config)
            return self._preprocessors[task.name]
