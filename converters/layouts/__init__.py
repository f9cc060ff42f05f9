"""The on-disk conventions of θ. One file per layout; each says whether a folder is its own, and reads it."""

from pathlib import Path
from typing import Protocol

from converters.adapter import Adapter
from converters.errors import LayoutError
from converters.layouts import peft


class Layout(Protocol):
    """One convention: a module with these two functions."""

    def claims(self, folder: Path) -> str | None:
        """The evidence that `folder` is in this layout, or None."""

    def read(self, folder: Path, evidence: str) -> Adapter:
        """The adapter in a folder that `claims` accepted."""


LAYOUTS: tuple[Layout, ...] = (peft,)


def load_adapter(adapter: str | Path) -> Adapter:
    """Open a trained adapter. Weights are read when they are asked for.

    Args:
        adapter: a folder.

    Raises:
        LayoutError: not a folder, or in no layout this version reads (it says what was found).
        AdapterConfigError: the config is invalid, unknown, or disagrees with the weights.
        ThetaError: weights are missing, extra, misshapen, damaged or not finite.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        kind = "a file" if folder.is_file() else "not there"
        raise LayoutError(f"{adapter} is {kind}; wanted the folder that PEFT's save_pretrained wrote")
    for layout in LAYOUTS:
        evidence = layout.claims(folder)
        if evidence is not None:
            return layout.read(folder, evidence)
    nested = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if nested:
        raise LayoutError(f"{adapter} holds no adapter itself; it has {', '.join(nested)}: give one of these")
    if (folder / "config.json").is_file():
        raise LayoutError(f"{adapter} is a model, wanted an adapter (a folder with adapter_config.json)")
    raise LayoutError(f"{adapter} holds no adapter_config.json; wanted a folder that PEFT's save_pretrained wrote")
