"""Puts rows together into a batch, and takes the outputs of a batch apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.inference.kinds import ModelKind
from converters.inference.session import Arrays

_BY_TOKEN = ("token-classification", "feature-extraction", "question-answering")


def is_by_token(kind: ModelKind) -> bool:
    """Whether the outputs have the tokens of the input as their second dimension."""
    return kind.task in _BY_TOKEN and not kind.takes_files


def length(arrays: Arrays) -> int:
    """The tokens of rows of texts; 1 for images and sounds, which are batched only if they have one size."""
    return arrays["input_ids"].shape[1] if "input_ids" in arrays else 1


def together(parts: Sequence[Arrays], pad_id: int) -> dict[str, NDArray[Any]]:
    """All rows in one batch; texts are padded on the right to the longest, with an `attention_mask` of 0 there."""
    if len(parts) == 1:
        return dict(parts[0])
    longest = max(map(length, parts))
    if longest == min(map(length, parts)):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        name: _padded([part[name] for part in parts], longest, pad_id * (name == "input_ids")) for name in parts[0]
    }


def _padded(arrays: Sequence[NDArray[Any]], longest: int, fill: int) -> NDArray[Any]:
    whole = np.full((sum(map(len, arrays)), longest), fill, arrays[0].dtype)
    start = 0
    for array in arrays:
        whole[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return whole


def apart(
    outputs: Sequence[NDArray[np.float32]], parts: Sequence[Arrays], kind: ModelKind
) -> list[list[NDArray[np.float32]]]:
    """The outputs of each part, without those of padding: copies, so that one does not keep the whole batch."""
    found, start = [], 0
    for part in parts:
        count = len(next(iter(part.values())))
        rows = [output[start : start + count] for output in outputs]
        found.append([(row[:, : length(part)] if is_by_token(kind) else row).copy() for row in rows])
        start += count
    return found
