"""What can be chosen of an export. Imports no onnx, so that it can be named where that is not installed."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

# torch's translations are written in it, and every ONNX Runtime since 1.14 runs it, in browsers too
DEFAULT_OPSET = 18


class Form(str, Enum):
    """How tasks are written."""

    MERGED = "merged"  # a folder for each, with a graph that needs nothing else
    SHARED = "shared"  # one folder: a graph for each, and one file of the weights they have in common
    SWAPPABLE = "swappable"  # one folder: one graph, and a file of low-rank inputs for each
    SELF_MERGING = (
        "self-merging"  # one folder: a graph for each that holds θ and f, and one file of the base's weights
    )


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how it is checked.

    Attributes:
        form: how tasks are written.
        opset: of the graphs.
        quantize: precisions to write besides float32: `int8` (dynamic, per channel), `fp16`.
        transformersjs: put graphs under `onnx/`, where transformers.js looks for them.
        eval_data: labelled images, sounds or texts to measure every graph on.
        interpolate_pos_encoding: interpolate embeddings of positions for images of another size than the config's.
        verify: compare every graph with torch.
        device: where f is evaluated.
    """

    form: Form = Form.MERGED
    opset: int = DEFAULT_OPSET
    quantize: tuple[str, ...] = ()
    transformersjs: bool = False
    eval_data: Path | None = None
    interpolate_pos_encoding: bool = False
    verify: bool = True
    device: str = "auto"
