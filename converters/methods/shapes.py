"""The shapes of θ, written down by the names of their axes, and the sizes that a θ gives them."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ThetaError

Axes = tuple[str | int, ...]  # the name of a size, or the size itself


def find_sizes(
    shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Axes], may_be_empty: str | None = None
) -> dict[str, int]:
    """The size of every named axis.

    Args:
        shapes: part of θ -> its shape.
        wanted: part of θ -> its axes; a part that is not in `shapes` is left out.
        may_be_empty: the name that may have the size 0.

    Raises `ThetaError` when a part has other axes, or two parts give one name two sizes.
    """
    sizes: dict[str, int] = {}
    for part, axes in wanted.items():
        if part not in shapes:
            continue
        shape = shapes[part]
        fits = len(shape) == len(axes) and all(
            (size if axis == size else sizes.setdefault(axis, size) if isinstance(axis, str) else None) == size
            and (size > 0 or axis == may_be_empty)
            for size, axis in zip(shape, axes, strict=True)
        )
        if not fits:
            raise ThetaError(f"{_listed(shapes, wanted)}; expected {_axes_listed(shapes, wanted)}")
    return sizes


def _listed(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Axes]) -> str:
    return ", ".join(f"{part} has shape {shapes[part]}" for part in wanted if part in shapes)


def _axes_listed(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Axes]) -> str:
    return ", ".join(f"{part} {_tuple(axes)}" for part, axes in wanted.items() if part in shapes)


def _tuple(axes: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, axes))}{',' if len(axes) == 1 else ''})"
