"""Architectures as ONNX: graphs in ONNX Runtime against PEFT's own unmerged forward pass, in float32."""

from pathlib import Path

import pytest
from support.onnx_zoo.running import ROWS, TOLERANCE, run_row

from converters.outputs.onnx.options import Form

pytestmark = pytest.mark.slow  # a trace for each


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.in_tests])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    forms = [Form.SHARED, Form.SWAPPABLE]
    if name == "gpt2":
        forms.append(Form.SELF_MERGING)  # f of weights that are stored transposed
    differences = run_row(ROWS[name], tmp_path, forms)
    assert all(found <= TOLERANCE for found in differences.values()), differences
