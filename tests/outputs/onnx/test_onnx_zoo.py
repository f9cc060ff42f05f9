"""Architectures as ONNX: graphs in ONNX Runtime against PEFT's own unmerged forward pass, in float32.

One row of each kind of thing; the others are run by `make onnx-models`, whose record `tests/documents` reads.
"""

from pathlib import Path

import pytest
from support.onnx_zoo.running import ROWS, TOLERANCE, run_row

pytestmark = pytest.mark.slow  # a trace for each


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.tested])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    found = run_row(ROWS[name], tmp_path, ROWS[name].tested)
    assert found.largest <= TOLERANCE, found
