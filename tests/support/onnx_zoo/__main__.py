"""Run every row in every form, write tests/data/onnx_models.json and the table made from it: `make onnx-models`.

Arguments are names of rows; without any, all rows run.
"""

import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from support.onnx_zoo.record import RECORD, entry_of, models_table
from support.onnx_zoo.running import ROWS, run_row
from support.paths import ROOT
from transformers.utils import logging

_PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "onnxscript")
_HEAD = "| model | tasks | forms | largest difference |"


def main(names: list[str]) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else {}
    for name in names or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            known[name] = entry_of(ROWS[name], run_row(ROWS[name], Path(folder), ROWS[name].forms))
        print(name, known[name]["differences"], flush=True)
        versions = {package: version(package) for package in _PACKAGES}
        found = {"versions": versions, "rows": {one: known[one] for one in ROWS if one in known}}
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    page = ROOT / "converters" / "README.md"
    table = "\n".join(models_table()) + "\n"
    page.write_text(re.sub(re.escape(_HEAD) + r"\n(\|.*\n)*", lambda _: table, page.read_text()))


main(sys.argv[1:])
