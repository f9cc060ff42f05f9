"""Graphs in int8 and fp16: what becomes of their layers, and what they still answer."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from support.onnx_models import SIZES, TEXTS, cosine, export_graph, make_text_model, texts
from support.paths import DATA, ROOT

from converters.errors import ConversionError
from converters.inference.session import Session
from converters.outputs.onnx.graphs import quantization
from converters.outputs.onnx.graphs.quantization import Quantized, quantize

LABELS = ["bad", "fair", "good"]
IMAGES = ("digits5to9", "oddeven")
MODELS = (*IMAGES, *TEXTS)
PRECISIONS = ("int8", "fp16")
VIT = DATA / "vit-tiny"


@dataclass(frozen=True)
class Exported:
    """A graph and what was made of it, by precision, `fp32` among them."""

    paths: dict[str, Path]
    facts: dict[str, Quantized]

    def run(self, precision: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return Session(self.paths[precision]).run(inputs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    found = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        pair = (VIT / "base", VIT / name) if name in IMAGES else make_text_model(name, folder)
        model = export_graph(*pair, folder / "onnx", LABELS if name in ("bert", "roberta") else None)
        paths = {precision: folder / f"{precision}.onnx" for precision in PRECISIONS}
        facts = {precision: quantize(model, path, precision) for precision, path in paths.items()}
        found[name] = Exported({"fp32": model, **paths}, facts)
    return found


@pytest.fixture(scope="module")
def pixels() -> dict[str, np.ndarray]:
    """Digits that no adapter was trained on, float32 (397, 1, 16, 16)."""
    images = torch.tensor(load_digits().images[1400:] / 16, dtype=torch.float32)[:, None]
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear", align_corners=False)
    return {"pixel_values": ((images - 0.5) / 0.5).numpy()}


def strictly(model: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """With every result rounded, as on a GPU; on a CPU ONNX Runtime computes most of fp16 in float32."""
    (found,) = ReferenceEvaluator(onnx.load(model)).run(None, inputs)
    assert found.dtype == np.float32
    return found


def linear_modules(folder: Path) -> dict[str, torch.nn.Linear]:
    config = tf.AutoConfig.from_pretrained(folder)
    model = getattr(tf, config.architectures[0])(config)
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def read_initializers(model: Path) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(model).graph.initializer}


def header(proto: ModelProto) -> tuple[object, ...]:
    """All but the nodes and numbers."""
    values = [v.SerializeToString() for v in (*proto.graph.input, *proto.graph.output)]
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    opsets = [(one.domain, one.version) for one in proto.opset_import]
    return proto.ir_version, proto.producer_name, proto.producer_version, opsets, values, metadata, proto.doc_string


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_int8(exported: dict[str, Exported], name: str) -> None:
    one = exported[name]
    modules = linear_modules(one.paths["fp32"].parent)
    graph = onnx.load(one.paths["int8"]).graph
    matrices = [t for t in graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2]
    operators = [node.op_type for node in graph.node]
    assert one.facts["int8"].linears == one.facts["int8"].quantized == len(modules)
    assert sorted(tuple(t.dims) for t in matrices) == sorted(module.weight.T.shape for module in modules.values())
    assert {t.name.partition(".weight")[0] for t in matrices} >= modules.keys() - {"lm_head"}  # that is tied
    assert operators.count("MatMulInteger") == len(modules)
    assert "Gemm" not in operators
    names = {tensor.name for tensor in graph.initializer}
    assert not [node.name for node in graph.node if node.op_type == "MatMul" and {*node.input} & names]
    scales = {tuple(t.dims) for t in graph.initializer if t.name.endswith("_scale") and len(t.dims) == 1}
    assert scales == {(module.out_features,) for module in modules.values()}  # one for each channel


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_fp16(exported: dict[str, Exported], name: str) -> None:
    one = exported[name]
    modules = linear_modules(one.paths["fp32"].parent)
    before, after = (read_initializers(one.paths[precision]) for precision in ("fp32", "fp16"))
    assert one.facts["fp16"].linears == one.facts["fp16"].quantized == len(modules)
    for module in modules:
        wanted = numpy_helper.to_array(before[f"{module}.weight"]).astype(np.float16)
        found = numpy_helper.to_array(after[f"{module}.weight"])
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, wanted, rtol=0, atol=6e-8)  # the least fp16 instead of 0
    assert not [t.name for t in after.values() if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 8]


@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 0.25, 0.28), ("fp16", 0.5, 0.51)])
@pytest.mark.parametrize("name", IMAGES)
def test_sizes(exported: dict[str, Exported], name: str, precision: str, least: float, most: float) -> None:
    one = exported[name]
    size = one.paths[precision].stat().st_size
    assert one.facts[precision].nbytes == size
    assert least < size / one.paths["fp32"].stat().st_size < most


@pytest.mark.parametrize("name", TEXTS)
def test_embeddings_are_int8(exported: dict[str, Exported], name: str) -> None:
    table = SIZES["vocab_size"] * SIZES["hidden_size"]
    floats = [t for t in read_initializers(exported[name].paths["int8"]).values() if t.data_type == TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in floats) < table / 8


@pytest.mark.parametrize("name", IMAGES)
def test_real_classifiers_answer_as_in_float32(
    exported: dict[str, Exported], pixels: dict[str, np.ndarray], name: str
) -> None:
    wanted, int8, fp16 = (exported[name].run(precision, pixels) for precision in ("fp32", *PRECISIONS))
    assert len(np.unique(wanted.argmax(1))) == wanted.shape[1]
    assert cosine(int8, wanted) > 0.999
    assert (int8.argmax(1) == wanted.argmax(1)).mean() >= 0.98
    assert np.abs(int8 - wanted).max() > 1e-3  # it is another graph
    assert 0 < np.abs(fp16 - wanted).max() < 2e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ("bert", "roberta"))
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 11), (5, 40)])
def test_padded_texts(exported: dict[str, Exported], name: str, batch: int, length: int) -> None:
    inputs = texts(name, batch, length)
    wanted, int8, fp16 = (exported[name].run(precision, inputs) for precision in ("fp32", *PRECISIONS))
    assert wanted.shape == (batch, len(LABELS))
    assert np.abs(wanted).max() > 0.3  # else nothing is compared
    assert cosine(int8, wanted) > 0.99
    np.testing.assert_allclose(fp16, wanted, atol=1e-2)
    np.testing.assert_allclose(strictly(exported[name].paths["fp16"], inputs), wanted, atol=1e-2)


def test_rows_that_are_masked_whole_are_finite(exported: dict[str, Exported]) -> None:
    """The first tokens of texts that are padded on the left see nothing: -inf throughout would become NaN."""
    inputs = texts("llama", 4, 12, pad_left=True)
    wanted, int8, fp16 = (exported["llama"].run(precision, inputs) for precision in ("fp32", *PRECISIONS))
    strict = strictly(exported["llama"].paths["fp16"], inputs)
    real = inputs["attention_mask"] == 1
    for found in (fp16, strict):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[real], wanted[real], atol=0.03)
    assert cosine(int8[real], wanted[real]) > 0.99


def test_large_activations_do_not_overflow_in_norms(exported: dict[str, Exported], tmp_path: Path) -> None:
    model = onnx.load(exported["llama"].paths["fp32"])
    name = "model.layers.0.mlp.down_proj.weight"
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1000, name))
    onnx.save(model, tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "fp16.onnx", "fp16")
    inputs = texts("llama", 1, 12)
    wanted = Session(tmp_path / "model.onnx").run(inputs)
    np.testing.assert_allclose(strictly(tmp_path / "fp16.onnx", inputs), wanted, atol=0.03)


def test_fp16_tells_late_positions_apart(exported: dict[str, Exported]) -> None:
    inputs = texts("llama", 1, 2200)
    wanted, found = (exported["llama"].run(precision, inputs)[:, 2048:] for precision in ("fp32", "fp16"))
    np.testing.assert_allclose(found, wanted, atol=0.03)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_rest_is_as_it_was(exported: dict[str, Exported], name: str, precision: str) -> None:
    path = exported[name].paths[precision]
    before, after = onnx.load(exported[name].paths["fp32"]), onnx.load(path)
    onnx.checker.check_model(str(path), full_check=True)
    assert header(after) == header(before)
    assert after.producer_name == "peanut-serve"
    assert not after.graph.value_info
    assert not after.functions
    assert {node.domain for node in after.graph.node} == {""}
    metadata = {entry.key: entry.value for entry in after.metadata_props}
    if name in ("bert", "roberta"):
        assert list(json.loads(metadata["id2label"]).values()) == LABELS
    for tensor in after.graph.initializer:
        tensor.ClearField("raw_data")  # numbers may spell anything
    content = after.SerializeToString()
    for local in (b"/work", b"/tmp", b".py", b".onnx", os.fsencode(Path.home()), os.fsencode(path.parent)):
        assert local not in content


def test_the_same_input_gives_the_same_bytes(exported: dict[str, Exported], tmp_path: Path) -> None:
    """In another process, where sets of names have another order."""
    script = (
        "import sys; from pathlib import Path; from converters.outputs.onnx.graphs.quantization import quantize\n"
        "for precision in ('int8', 'fp16'): quantize(Path(sys.argv[1]), Path(precision), precision)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, exported["bert"].paths["fp32"]]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    for precision in PRECISIONS:
        assert (tmp_path / precision).read_bytes() == exported["bert"].paths[precision].read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_too_large_for_one_file_lie_beside_it(
    exported: dict[str, Exported], pixels: dict[str, np.ndarray], precision: str, tmp_path: Path, monkeypatch
) -> None:
    one, folder = exported["oddeven"], tmp_path / "large"
    folder.mkdir()
    onnx.save(
        onnx.load(one.paths["fp32"]), folder / "model.onnx", save_as_external_data=True, location="model.onnx_data"
    )
    monkeypatch.setattr(quantization, "SINGLE_FILE_BYTES", 1_000_000)
    facts = quantize(folder / "model.onnx", folder / "small.onnx", precision)
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "model.onnx_data", "small.onnx", "small.onnx_data",
    }  # fmt: skip
    sizes = [(folder / name).stat().st_size for name in ("small.onnx", "small.onnx_data")]
    assert facts.nbytes == sum(sizes)
    assert sizes[0] < 300_000
    (logits,) = [Session(folder / "small.onnx").run(pixels)]
    np.testing.assert_array_equal(logits, one.run(precision, pixels))


def test_weights_that_overflow_fp16_are_refused(exported: dict[str, Exported], tmp_path: Path) -> None:
    name = "vit.layers.3.mlp.fc1.weight"
    model = onnx.load(exported["oddeven"].paths["fp32"])
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    for value, fits in ((-65504.0, True), (-70000.0, False)):
        weights = numpy_helper.to_array(tensor).copy()
        weights[5, 7] = value
        tensor.CopyFrom(numpy_helper.from_array(weights, name))
        onnx.save(model, tmp_path / "model.onnx")
        if fits:
            quantize(tmp_path / "model.onnx", tmp_path / "small.onnx", "fp16")
            stored = read_initializers(tmp_path / "small.onnx")[name]
            assert numpy_helper.to_array(stored)[5, 7] == value
            (tmp_path / "small.onnx").unlink()
        else:
            with pytest.raises(ConversionError, match=rf"^{name} has a weight of 70000 and fp16 ends at 65504"):
                quantize(tmp_path / "model.onnx", tmp_path / "small.onnx", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert quantize(tmp_path / "model.onnx", tmp_path / "small.onnx", "int8").quantized == 37


@pytest.mark.parametrize(
    ("precision", "step", "replacement"),
    [
        ("int8", "_fold_transposes", lambda graph: None),
        ("fp16", "_float32_nodes", lambda graph, floats: all_of(graph)),
    ],
)
def test_a_graph_that_stayed_float_is_refused(
    exported: dict[str, Exported], precision: str, step: str, replacement: object, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(quantization, step, replacement)
    number = {"int8": 1, "fp16": 0}[precision]  # the head is a Gemm
    with pytest.raises(ConversionError, match=f"only {number} of 37 linear layers became {precision}, wanted 90%"):
        quantize(exported["oddeven"].paths["fp32"], tmp_path / "small.onnx", precision)
    assert not [*tmp_path.iterdir()]


def all_of(graph: onnx.GraphProto) -> set[str]:
    return {node.name for node in graph.node}


@pytest.mark.parametrize(
    ("precision", "library"), [("int8", "quantize_dynamic"), ("fp16", "convert_float_to_float16")]
)
def test_errors_of_libraries_are_one_line(
    exported: dict[str, Exported], precision: str, library: str, tmp_path: Path, monkeypatch
) -> None:
    def fail(*given: object, **settings: object) -> None:
        raise RuntimeError("node x:\n  unknown\n" + "y" * 1000)

    monkeypatch.setattr(quantization, library, fail)
    with pytest.raises(ConversionError, match=f"^model.onnx cannot be converted to {precision}: node x: unknown y+$"):
        quantize(exported["bert"].paths["fp32"], tmp_path / "small.onnx", precision)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ConversionError, match="model.onnx cannot be converted") as raised:
        quantize(tmp_path / "model.onnx", tmp_path / "small.onnx", precision)
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError):
        quantize(tmp_path / "none.onnx", tmp_path / "small.onnx", precision)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_logged_or_left(
    exported: dict[str, Exported], precision: str, count: int, tmp_path: Path, monkeypatch, capfd
) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler()] * count
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/none")  # whoever writes there fails
        patch.setattr(logging.root, "handlers", [*handlers])
        patch.setattr(logging.root.manager, "disable", logging.DEBUG)
        quantize(exported["bert"].paths["fp32"], tmp_path / "small.onnx", precision)
        settings = tempfile.tempdir, logging.root.handlers, logging.root.manager.disable
    assert settings == ("/none", handlers, logging.DEBUG)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
