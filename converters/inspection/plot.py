"""A plot of the relative size of an adapter's delta, per layer and kind of module."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from converters.errors import MissingDependencyError, OptionError, OutputError, OutputExistsError
from converters.inspection.norms import DeltaNorm, norm_table


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be written, before the norms are computed.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError: matplotlib does not support the file extension, or the parent folder does not exist.
        OutputExistsError: the file exists.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise MissingDependencyError("plotting needs matplotlib: pip install 'peanut-serve[plot]'") from None
    extensions = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in extensions:
        raise OptionError(
            f"{path}: '{path.suffix}' is not a supported format; expected one of {', '.join(sorted(extensions))}"
        )
    if path.exists():
        raise OutputExistsError(f"the plot {path} exists; choose another file")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{path}: there is no folder {path.absolute().parent}; create it or choose another file")


def plot_norms(norms: Sequence[DeltaNorm], title: str, path: Path) -> None:
    """Draw `|f(W0)| / |W0|` as a grid with a row for each kind of module and a column for each layer.

    Raises `OutputError` if the file cannot be written.
    """
    from matplotlib.figure import Figure

    layers, kinds, cells = norm_table(norms)
    grid = [[cells[layer].get(kind, math.nan) for layer in layers] for kind in kinds]
    figure = Figure(figsize=(3.5 + 0.3 * len(layers), 1.6 + 0.4 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_facecolor("lightgrey")  # modules that are not adapted
    axes.set_xticks(range(len(layers)), [layer.rsplit(".", 1)[-1] or "-" for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="|f(W0)| / |W0|")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."), dpi=150)
    try:
        path.write_bytes(drawn.getvalue())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(f"the plot {path} could not be written: {error}") from error
