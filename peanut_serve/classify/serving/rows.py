"""Puts rows together into a batch, and takes the outputs of a batch apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.inference.kinds import ModelKind
from converters.inference.session import Arrays

# tasks whose outputs have the tokens of the input as their second dimension
_BY_TOKEN = ("token-classification", "feature-extraction")


def length(arrays: Arrays) -> int:
    """The tokens of rows of texts; 1 for images, which have one size."""
    return arrays["input_ids"].shape[1] if "input_ids" in arrays else 1


def together(parts: Sequence[Arrays], pad_id: int) -> dict[str, NDArray[Any]]:
    """All rows in one batch; texts are padded on the right to the longest, with an `attention_mask` of 0 there."""
    if len(parts) == 1:
        return dict(parts[0])
    longest = max(map(length, parts))
    return {name: np.concatenate([_padded(part[name], name, longest, pad_id) for part in parts]) for name in parts[0]}


def _padded(array: NDArray[Any], name: str, longest: int, pad_id: int) -> NDArray[Any]:
    if name == "pixel_values" or array.shape[1] == longest:
        return array
    absent = longest - array.shape[1]
    return np.pad(array, ((0, 0), (0, absent)), constant_values=pad_id if name == "input_ids" else 0)


def apart(
    outputs: Sequence[NDArray[np.float32]], parts: Sequence[Arrays], kind: ModelKind
) -> list[list[NDArray[np.float32]]]:
    """The outputs of each part, without those of padding: copies, so that one does not keep the whole batch."""
    found, start = [], 0
    by_token = kind.task in _BY_TOKEN and not kind.takes_files
    for part in parts:
        count = len(next(iter(part.values())))
        rows = [output[start : start + count] for output in outputs]
        found.append([(row[:, : length(part)] if by_token else row).copy() for row in rows])
        start += count
    return found
