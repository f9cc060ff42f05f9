"""Graphs in int8 and fp16: what they still answer."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from support.onnx_models import IMAGES, LABELS, PRECISIONS, Graphs, cosine, texts

from converters.inference.session import Session
from converters.outputs.onnx.graphs.quantization import quantize

pytestmark = pytest.mark.slow  # traces and quantizes models


def strictly(model: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """With every result rounded, as on a GPU; on a CPU ONNX Runtime computes most of fp16 in float32."""
    (found,) = ReferenceEvaluator(onnx.load(model)).run(None, inputs)
    assert found.dtype == np.float32
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_real_classifiers_answer_as_in_float32(
    graphs: dict[str, Graphs], pixels: dict[str, np.ndarray], name: str
) -> None:
    wanted, int8, fp16 = (graphs[name].run(precision, pixels) for precision in ("fp32", *PRECISIONS))
    assert len(np.unique(wanted.argmax(1))) == wanted.shape[1]
    assert cosine(int8, wanted) > 0.999
    assert (int8.argmax(1) == wanted.argmax(1)).mean() >= 0.98
    assert np.abs(int8 - wanted).max() > 1e-3  # it is another graph
    assert 0 < np.abs(fp16 - wanted).max() < 2e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ("bert", "roberta"))
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 11), (5, 40)])
def test_padded_texts(graphs: dict[str, Graphs], name: str, batch: int, length: int) -> None:
    inputs = texts(name, batch, length)
    wanted, int8, fp16 = (graphs[name].run(precision, inputs) for precision in ("fp32", *PRECISIONS))
    assert wanted.shape == (batch, len(LABELS))
    assert np.abs(wanted).max() > 0.3  # else nothing is compared
    assert cosine(int8, wanted) > 0.99
    np.testing.assert_allclose(fp16, wanted, atol=1e-2)
    np.testing.assert_allclose(strictly(graphs[name].paths["fp16"], inputs), wanted, atol=1e-2)


def test_rows_that_are_masked_whole_are_finite(graphs: dict[str, Graphs]) -> None:
    """The first tokens of texts that are padded on the left see nothing: -inf throughout would become NaN."""
    inputs = texts("llama", 4, 12, pad_left=True)
    wanted, int8, fp16 = (graphs["llama"].run(precision, inputs) for precision in ("fp32", *PRECISIONS))
    strict = strictly(graphs["llama"].paths["fp16"], inputs)
    real = inputs["attention_mask"] == 1
    for found in (fp16, strict):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[real], wanted[real], atol=0.03)
    assert cosine(int8[real], wanted[real]) > 0.99


def test_large_activations_do_not_overflow_in_norms(graphs: dict[str, Graphs], tmp_path: Path) -> None:
    model = onnx.load(graphs["llama"].paths["fp32"])
    name = "model.layers.0.mlp.down_proj.weight"
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1000, name))
    onnx.save(model, tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "fp16.onnx", "fp16")
    inputs = texts("llama", 1, 12)
    wanted = Session(tmp_path / "model.onnx").run(inputs)
    np.testing.assert_allclose(strictly(tmp_path / "fp16.onnx", inputs), wanted, atol=0.03)


def test_fp16_tells_late_positions_apart(graphs: dict[str, Graphs]) -> None:
    inputs = texts("llama", 1, 2200)
    wanted, found = (graphs["llama"].run(precision, inputs)[:, 2048:] for precision in ("fp32", "fp16"))
    np.testing.assert_allclose(found, wanted, atol=0.03)
