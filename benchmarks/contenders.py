"""What is measured: commands that make one folder of another, each a process of its own."""

import sys
from dataclasses import dataclass
from pathlib import Path

PYTHON = Path(sys.executable)

# the floor: what has to be read and written anyway, and brought to the disk
COPY = 'cp -r "$1" "$2" && sync "$2"/* "$2"'

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""

# An ONNX graph without us: a merge and a trace for each task. optimum-onnx 0.1.0, which would trace for its users,
# wants transformers < 4.58 and cannot run beside the transformers that PEFT's PEANuT and we need.
PEFT_ONNX = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification
base, adapter, labels, output = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(base, num_labels=int(labels), ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
pixels = torch.randn(2, model.config.num_channels, model.config.image_size, model.config.image_size)
torch.onnx.export(
    model, (pixels,), output, dynamo=True, input_names=["pixel_values"], output_names=["logits"],
    dynamic_shapes={"pixel_values": {0: torch.export.Dim.DYNAMIC}},
)
"""

# mergekit knows no PEANuT: this is what it takes to stream the same base through it
MERGEKIT = """
merge_method: passthrough
dtype: {dtype}
slices:
  - sources:
      - model: {base}
        layer_range: [0, {layers}]
"""


@dataclass(frozen=True)
class Case:
    """A base and an adapter on it."""

    name: str
    base: Path
    adapter: Path
    dtype: str
    layers: int


def peanut_merge(case: Case, output: Path) -> list[str | Path]:
    """Ours, as it comes: verified and synced."""
    return [PYTHON.parent / "peanut-merge", "--base", case.base, "--adapter", case.adapter, "-o", output]


def copy(case: Case, output: Path) -> list[str | Path]:
    """`cp -r` and fsync."""
    return ["sh", "-c", COPY, "copy", case.base, output]


def peft(case: Case, output: Path) -> list[str | Path]:
    """PEFT's merge; neither verified nor synced."""
    return [PYTHON, "-c", PEFT, case.base, case.adapter, output]


def peft_onnx(base: Path, adapter: Path, labels: int, output: Path) -> list[str | Path]:
    """An image classifier merged by PEFT and exported by torch to the file `output`; not verified."""
    return [PYTHON, "-c", PEFT_ONNX, base, adapter, str(labels), output]


def mergekit(program: str, case: Case, output: Path) -> list[str | Path]:
    """mergekit, from an environment of its own."""
    settings = output.with_name("mergekit.yaml")
    settings.write_text(MERGEKIT.format(base=case.base, dtype=case.dtype, layers=case.layers))
    return [program, settings, output]


def interpreter() -> list[str | Path]:
    """What every Python program that uses torch begins with."""
    return [PYTHON, "-c", "import torch"]
