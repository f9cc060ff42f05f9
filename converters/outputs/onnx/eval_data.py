"""Labelled examples on disk, and the score of a model on them. The model is any function from inputs to logits."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.errors import OptionError, VerificationError
from converters.inference.examples import IMAGE_SUFFIXES, Example, Preprocessor
from converters.inference.kinds import ModelKind
from converters.inference.sounds import SOUND_SUFFIXES

Logits = Callable[[dict[str, NDArray[Any]]], NDArray[Any]]

_SUFFIXES = {"image-classification": IMAGE_SUFFIXES, "audio-classification": SOUND_SUFFIXES}  # of files, by task
_LABELS_SHOWN = 6
_FIRST_COLUMNS = ("text", "sentence", "sentence1")
_COLUMNS_WANTED = (
    "expected 'label' and one of 'text' (perhaps with 'text_pair'), 'sentence' (perhaps with 'text_pair'), or "
    "'sentence1' with 'sentence2', each once"
)


@dataclass(frozen=True, eq=False)
class EvalData:
    """Labelled examples.

    Attributes:
        name: of the folder or file.
        examples: in the order of class folders and file names, or of the rows.
        targets: (examples,) indices of labels, int64; or values to predict, float64.
    """

    name: str
    examples: tuple[Example, ...]
    targets: NDArray[Any]


class Batch(NamedTuple):
    """Some examples as inputs of a graph, and their targets."""

    inputs: dict[str, NDArray[Any]]
    targets: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Score:
    """The score of a model.

    Attributes:
        count: number of examples.
        predictions: (count,) indices of labels, int64; or values, float64.
        accuracy: share of correct labels; None for values.
        pearson: correlation of predicted and correct values; None for labels, or if either are constant.
        mean_absolute_error: of the values; None for labels.
    """

    count: int
    predictions: NDArray[Any] = field(repr=False)
    accuracy: float | None = None
    pearson: float | None = None
    mean_absolute_error: float | None = None

    def summary(self) -> dict[str, Any]:
        """For the manifest: JSON values, without the predictions."""
        if self.mean_absolute_error is None:
            return {"count": self.count, "accuracy": self.accuracy}
        return {"count": self.count, "pearson": self.pearson, "mean_absolute_error": self.mean_absolute_error}


def read_eval_data(path: Path, kind: ModelKind, labels: Sequence[str]) -> EvalData:
    """Labelled examples of a folder `path/LABEL/FILE` or, for texts, of a CSV file in UTF-8 with a header.

    The CSV has a column `label`, and `text` or `sentence` (perhaps with `text_pair`), or `sentence1` and `sentence2`;
    other columns are ignored. A label is given by its name or, if there is no such name, by its index. For texts and
    a single label the model predicts a value, and `label` is that value.

    In a class folder, files with the suffix of an image (`IMAGE_SUFFIXES`) or of a sound (`SOUND_SUFFIXES`) are used;
    hidden files are not. They are opened when they are preprocessed.

    Raises `OptionError` for a kind that does not classify images, sounds or texts, and for data that is not as above.
    """
    if kind.task not in (*_SUFFIXES, "text-classification"):
        raise OptionError(f"eval data is for classifiers of images, sounds and texts, not for {kind.task}")
    if not labels:
        raise OptionError(f"{path}: the model's config.json names no labels, expected an id2label from '0' on")
    suffixes = _SUFFIXES.get(kind.task)
    examples, targets = _read_csv(path, labels) if suffixes is None else _read_folder(path, labels, suffixes)
    return EvalData(path.resolve().name, examples, targets)


def batches(data: EvalData, preprocessor: Preprocessor, batch_size: int = 8) -> Iterator[Batch]:
    """The preprocessed data; as a list it can be used for several models (at 224 x 224, 600 kB per image)."""
    for start in range(0, len(data.examples), batch_size):
        part = slice(start, start + batch_size)
        yield Batch(preprocessor(data.examples[part]), data.targets[part])


def score_of(logits: Logits, prepared: Iterable[Batch]) -> Score:
    """The score of a model on batches, at least one.

    Args:
        logits: computes the model's logits (batch, labels) for its inputs; (batch, 1) if it predicts values.
        prepared: see `batches`.

    Raises `VerificationError` if logits do not have that shape, or are not finite.
    """
    predicted, wanted = [], []
    for batch in prepared:
        found = np.asarray(logits(batch.inputs))
        is_value = batch.targets.dtype.kind == "f"
        if found.ndim != 2 or len(found) != len(batch.targets) or (is_value and found.shape[1] != 1):
            width = "1" if is_value else "labels"
            raise VerificationError(f"the model gives logits {found.shape}, expected ({len(batch.targets)}, {width})")
        if not np.isfinite(found).all():
            raise VerificationError("the model gives logits that are NaN or infinite, so it cannot be measured")
        predicted.append(found[:, 0].astype(np.float64) if is_value else found.argmax(axis=1))
        wanted.append(batch.targets)
    predictions, targets = np.concatenate(predicted), np.concatenate(wanted)
    if targets.dtype.kind == "f":
        error = float(np.abs(predictions - targets).mean())
        return Score(len(targets), predictions, pearson=_pearson(predictions, targets), mean_absolute_error=error)
    return Score(len(targets), predictions, accuracy=float((predictions == targets).mean()))


def agreement(a: Score, b: Score) -> float:
    """How similar the predictions of two models are on the same data; 1 if they are equal.

    The share of examples with the same label; for values, Lin's concordance: a correlation that, unlike
    Pearson's, decreases when one of them is shifted or scaled.

    Raises `ValueError` if the scores are of different numbers of examples.
    """
    if a.count != b.count:
        raise ValueError(f"scores of {a.count} and of {b.count} examples cannot be compared")
    x, y = a.predictions, b.predictions
    if a.accuracy is not None:
        return float((x == y).mean())
    spread = float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return 2 * float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread else 1.0


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else None


def _read_folder(
    path: Path, labels: Sequence[str], suffixes: Sequence[str]
) -> tuple[tuple[Example, ...], NDArray[np.int64]]:
    if len(labels) == 1:
        raise OptionError(f"{path}: folders name classes, but the model predicts a single value, {_quoted(labels)}")
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise OptionError(f"{path} {found}, expected a folder with a folder of files for each class")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    if not folders:
        raise OptionError(f"{path}: no class folders in it, expected {path.name}/LABEL/FILE")
    examples: list[Example] = []
    targets = []
    for folder in folders:
        target = _index(folder.name, labels, f"{folder}: no label has this name")
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.name[0] != ".")
        if not files:
            raise OptionError(f"{folder}: no examples in it, expected files that end in {', '.join(suffixes)}")
        examples += files
        targets += [target] * len(files)
    return tuple(examples), np.array(targets, np.int64)


def _read_csv(path: Path, labels: Sequence[str]) -> tuple[tuple[Example, ...], NDArray[Any]]:
    rows = _read_rows(path)
    if not rows:
        raise OptionError(f"{path} is empty, {_COLUMNS_WANTED}")
    _, header = rows.pop(0)
    columns = _text_columns(path, header)
    if not rows:
        raise OptionError(f"{path}: no rows under its header, expected an example in each")
    examples: list[Example] = []
    targets: list[float] = []
    for line, cells in rows:
        if len(cells) != len(header):
            raise OptionError(
                f"{path}, line {line}: {len(cells)} fields, expected {len(header)} as in the header; "
                "a field with a comma or a quote in it has to be quoted"
            )
        row = dict(zip(header, cells, strict=True))
        examples.append(row[columns[0]] if len(columns) == 1 else (row[columns[0]], row[columns[1]]))
        targets.append(_target(row, labels, f"{path}, line {line}"))
    return tuple(examples), np.array(targets, np.float64 if len(labels) == 1 else np.int64)


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The line each row starts at, from 1, and its fields; without empty lines."""
    rows, line = [], 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            reader = csv.reader(file, strict=True)  # otherwise an open quote swallows the rest of the file
            for cells in reader:
                if cells:
                    rows.append((line, cells))
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: not UTF-8 ({error}), expected a CSV file in UTF-8") from None
    except csv.Error as error:
        raise OptionError(
            f"{path}, line {line}: not CSV ({error}), expected fields with commas between them"
        ) from None
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror}), expected a CSV file") from None
    return rows


def _text_columns(path: Path, header: list[str]) -> list[str]:
    found = [name for name in _FIRST_COLUMNS if name in header]
    columns = [*found, *(["sentence2"] if "sentence1" in found else ["text_pair"] if "text_pair" in header else [])]
    if len(found) != 1 or any(header.count(name) != 1 for name in [*columns, "label"]):
        raise OptionError(f"{path}: its columns are {_quoted(header)}; {_COLUMNS_WANTED}")
    return columns


def _target(row: Mapping[str, str], labels: Sequence[str], where: str) -> float:
    label = row["label"]
    if len(labels) > 1:
        return _index(label, labels, f"{where}: the label is {label[:40]!r}")
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(
            f"{where}: the label is {label[:40]!r}, expected a finite number: the model predicts a value"
        )
    return value


def _index(label: str, labels: Sequence[str], complaint: str) -> int:
    """The place of a label given by name or else by its index. Raises `OptionError` if it is neither."""
    if label in labels:
        return labels.index(label)
    is_number = label.isascii() and label.isdecimal() and len(label) < 10  # int() rejects thousands of digits
    if is_number and int(label) < len(labels):
        return int(label)
    shown = _quoted(labels[:_LABELS_SHOWN]) + ", ..." * (len(labels) > _LABELS_SHOWN)
    raise OptionError(f"{complaint}, expected one of {shown}, or an index below {len(labels)}")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
