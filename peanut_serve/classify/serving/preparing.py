"""Turns inputs of requests into arrays, one row by itself for each, and checks arrays that clients prepared."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import OptionError
from converters.inference.audio import AudioPreprocessor
from converters.inference.examples import Example
from converters.inference.images import ImagePreprocessor
from converters.inference.kinds import ModelKind
from converters.inference.preprocessing import open_preprocessor
from converters.inference.session import Arrays
from converters.inference.sounds import read_sound
from converters.inference.texts import TextPreprocessor
from peanut_serve.classify.serving.limits import Limits
from peanut_serve.classify.tasks import OnnxTask
from peanut_serve.errors import VariantError

Spans = list[tuple[int, int] | None]

SERVED = (
    "image-classification", "image-feature-extraction", "audio-classification", "text-classification",
    "token-classification", "question-answering", "feature-extraction", "sentence-similarity",
)  # fmt: skip
_BY_PLACE = ("token-classification", "question-answering")  # tasks whose answers are parts of the text


@dataclass(frozen=True)
class Prepared:
    """An input as a row.

    Attributes:
        arrays: (1, ...), by the names of the graph's inputs.
        text: that answers are parts of; of token classifiers and for questions.
        spans: where the tokens of the row are in it; None for any other task.
    """

    arrays: Mapping[str, NDArray[Any]]
    text: str = ""
    spans: Spans | None = None


class Preparer:
    """Prepares inputs for graphs of one kind. Thread-safe.

    Args:
        preprocessor: of the model.
        kind: of its graph.
        limits: of which `max_characters` matters here.

    Attributes:
        pad_id: pads `input_ids`; the other inputs are padded with 0.
    """

    def __init__(
        self, preprocessor: AudioPreprocessor | ImagePreprocessor | TextPreprocessor, kind: ModelKind, limits: Limits
    ) -> None:
        self._preprocessor, self._kind, self._limits = preprocessor, kind, limits
        self._lock = threading.Lock()  # a tokenizer's settings change from call to call
        self.pad_id = preprocessor.pad_id if isinstance(preprocessor, TextPreprocessor) else 0

    def prepare(self, example: Example, truncate: bool = False) -> Prepared:
        """An input with all that its answer needs. Takes and raises what `row` does."""
        arrays = self.row(example, truncate)
        if self._kind.task not in _BY_PLACE:
            return Prepared(arrays)
        is_question = self._kind.task == "question-answering"
        if is_question != isinstance(example, tuple):
            raise OptionError(
                "the model takes pairs of a question and a text"
                if is_question
                else "the model takes single texts, not pairs"
            )
        assert isinstance(self._preprocessor, TextPreprocessor)
        assert isinstance(example, str | tuple)
        with self._lock:
            spans = self._preprocessor.spans(example)
        return Prepared(arrays, example if isinstance(example, str) else example[1], spans)

    def row(self, example: Example, truncate: bool = False) -> dict[str, NDArray[Any]]:
        """The arrays (1, ...) of an image, a sound, a text or a pair of texts.

        Args:
            example: content of a file, or texts; never a path.
            truncate: whether a text that is too long for the model is cut, or refused.

        Raises:
            OptionError: it is not what the model takes, broken, or too large.
            CheckpointError: tokenizer and model do not fit each other.
        """
        if isinstance(example, Path):
            raise OptionError("an input is a path, expected the content of a file, or a text")
        if isinstance(self._preprocessor, TextPreprocessor):
            self._check_text(example)
            with self._lock:
                return self._preprocessor([example], truncate)
        if not isinstance(example, bytes):
            what = "images" if isinstance(self._preprocessor, ImagePreprocessor) else "sounds"
            raise OptionError(f"the model takes {what}: send the content of a file, not text")
        if isinstance(self._preprocessor, AudioPreprocessor):
            self._check_sound(example)
        return self._preprocessor([example])

    def _check_sound(self, content: bytes) -> None:
        samples, rate = read_sound(content)
        if len(samples) > self._limits.max_seconds * rate:
            seconds = len(samples) / rate
            raise OptionError(
                f"a sound has {seconds:.1f} seconds, the limit is {self._limits.max_seconds:g}; split it"
            )

    def _check_text(self, example: Example) -> None:
        if isinstance(example, bytes):
            raise OptionError("the model takes texts: send text, not the content of a file")
        size = len(example) if isinstance(example, str) else sum(map(len, example))  # type: ignore[arg-type]
        if size > self._limits.max_characters:
            raise OptionError(f"a text has {size} characters, the limit is {self._limits.max_characters}; split it")

    def check(self, arrays: Arrays) -> int:
        """Check arrays that a client prepared; the number of their rows.

        Raises `OptionError` if one is missing, unknown, or has another type or shape than the graph takes.
        """
        inputs = self._kind.inputs
        if set(arrays) != set(inputs):
            raise OptionError(f"the inputs are {', '.join(sorted(arrays))}; expected {', '.join(inputs)}")
        shapes = {array.shape for array in arrays.values()}
        found = ", ".join(f"{name} {array.dtype}{array.shape}" for name, array in arrays.items())
        if isinstance(self._preprocessor, ImagePreprocessor):
            pixels, (channels, height, width) = arrays["pixel_values"], self._preprocessor.shape
            if pixels.dtype != np.float32 or pixels.shape[1:] != (channels, height, width) or not len(pixels):
                raise OptionError(f"found {found}; expected float32(images, {channels}, {height}, {width})")
            if not np.isfinite(pixels).all():
                raise OptionError("pixel_values has NaN or infinity")
            return len(pixels)
        if isinstance(self._preprocessor, AudioPreprocessor):
            raise OptionError("the model takes sounds; send the content of a WAV file as sound, not its samples")
        most = self._preprocessor.max_length
        (shape, *others) = shapes
        if others or len(shape) != 2 or 0 in shape or any(array.dtype != np.int64 for array in arrays.values()):
            raise OptionError(f"found {found}; expected int64(texts, tokens), the same shape for each")
        if shape[1] > most:
            raise OptionError(f"found {found}; the model takes {most} tokens")
        self._check_ids(arrays)
        return int(shape[0])

    def _check_ids(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        assert isinstance(self._preprocessor, TextPreprocessor)
        ids, most = arrays["input_ids"], self._preprocessor.vocab_size
        if ids.min() < 0 or ids.max() >= most:
            raise OptionError(f"input_ids are {ids.min()} to {ids.max()}; the model has tokens 0 to {most - 1}")
        mask = arrays["attention_mask"]
        if mask.min() < 0 or mask.max() > 1 or not mask.any(axis=1).all():
            raise OptionError("attention_mask has a row without a 1, or numbers other than 0 and 1")


def prepare_inputs(task: OnnxTask, limits: Limits) -> Preparer:
    """What prepares the inputs of a task.

    Raises:
        VariantError: this server does not answer for this kind of task.
        CheckpointError, MissingDependencyError: its tokenizer or preprocessor cannot be used.
    """
    if task.kind.task not in SERVED:
        raise VariantError(
            f"it does {task.kind.task}, which peanut-serve predict runs; served are {', '.join(SERVED)}"
        )
    return Preparer(open_preprocessor(task.folder, task.kind, task.config, limits.max_pixels), task.kind, limits)


def split_rows(arrays: Arrays, size: int) -> Sequence[dict[str, NDArray[Any]]]:
    """Arrays in parts of at most `size` rows."""
    count = len(next(iter(arrays.values())))
    return [{name: array[start : start + size] for name, array in arrays.items()} for start in range(0, count, size)]
