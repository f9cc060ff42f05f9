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


def mergekit(program: str, case: Case, output: Path) -> list[str | Path]:
    """mergekit, from an environment of its own."""
    settings = output.with_name("mergekit.yaml")
    settings.write_text(MERGEKIT.format(base=case.base, dtype=case.dtype, layers=case.layers))
    return [program, settings, output]


def interpreter() -> list[str | Path]:
    """What every Python program that uses torch begins with."""
    return [PYTHON, "-c", "import torch"]
