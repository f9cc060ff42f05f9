"""Graphs in int8 and fp16: what becomes of their layers."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from onnx import ModelProto, TensorProto, numpy_helper
from support.onnx_models import IMAGES, LABELS, MODELS, PRECISIONS, SIZES, TEXTS, Graphs
from support.paths import ROOT

from converters.errors import ConversionError
from converters.inference.session import Session
from converters.outputs.onnx.graphs import quantization
from converters.outputs.onnx.graphs.quantization import quantize

pytestmark = pytest.mark.slow  # traces and quantizes models


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
def test_every_linear_layer_is_int8(graphs: dict[str, Graphs], name: str) -> None:
    one = graphs[name]
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
def test_every_linear_layer_is_fp16(graphs: dict[str, Graphs], name: str) -> None:
    one = graphs[name]
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
def test_sizes(graphs: dict[str, Graphs], name: str, precision: str, least: float, most: float) -> None:
    one = graphs[name]
    size = one.paths[precision].stat().st_size
    assert one.facts[precision].nbytes == size
    assert least < size / one.paths["fp32"].stat().st_size < most


@pytest.mark.parametrize("name", TEXTS)
def test_embeddings_are_int8(graphs: dict[str, Graphs], name: str) -> None:
    table = SIZES["vocab_size"] * SIZES["hidden_size"]
    floats = [t for t in read_initializers(graphs[name].paths["int8"]).values() if t.data_type == TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in floats) < table / 8


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_rest_is_as_it_was(graphs: dict[str, Graphs], name: str, precision: str) -> None:
    path = graphs[name].paths[precision]
    before, after = onnx.load(graphs[name].paths["fp32"]), onnx.load(path)
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


def test_the_same_input_gives_the_same_bytes(graphs: dict[str, Graphs], tmp_path: Path) -> None:
    """In another process, where sets of names have another order."""
    script = (
        "import sys; from pathlib import Path; from converters.outputs.onnx.graphs.quantization import quantize\n"
        "for precision in ('int8', 'fp16'): quantize(Path(sys.argv[1]), Path(precision), precision)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, graphs["bert"].paths["fp32"]]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=120)
    for precision in PRECISIONS:
        assert (tmp_path / precision).read_bytes() == graphs["bert"].paths[precision].read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_too_large_for_one_file_lie_beside_it(
    graphs: dict[str, Graphs], pixels: dict[str, np.ndarray], precision: str, tmp_path: Path, monkeypatch
) -> None:
    one, folder = graphs["oddeven"], tmp_path / "large"
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


def test_weights_that_overflow_fp16_are_refused(graphs: dict[str, Graphs], tmp_path: Path) -> None:
    name = "vit.layers.3.mlp.fc1.weight"
    model = onnx.load(graphs["oddeven"].paths["fp32"])
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
            with pytest.raises(ConversionError, match=rf"^{name} has a weight of 70000, but fp16 ends at 65504"):
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
    graphs: dict[str, Graphs], precision: str, step: str, replacement: object, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(quantization, step, replacement)
    number = {"int8": 1, "fp16": 0}[precision]  # the head is a Gemm
    with pytest.raises(ConversionError, match=f"only {number} of 37 linear layers became {precision}, expected 90%"):
        quantize(graphs["oddeven"].paths["fp32"], tmp_path / "small.onnx", precision)
    assert not [*tmp_path.iterdir()]


def all_of(graph: onnx.GraphProto) -> set[str]:
    return {node.name for node in graph.node}


@pytest.mark.parametrize(
    ("precision", "library"), [("int8", "quantize_dynamic"), ("fp16", "convert_float_to_float16")]
)
def test_errors_of_libraries_are_one_line(
    graphs: dict[str, Graphs], precision: str, library: str, tmp_path: Path, monkeypatch
) -> None:
    def fail(*given: object, **settings: object) -> None:
        raise RuntimeError("node x:\n  unknown\n" + "y" * 1000)

    monkeypatch.setattr(quantization, library, fail)
    with pytest.raises(ConversionError, match=f"^model.onnx cannot be converted to {precision}: node x: unknown y+$"):
        quantize(graphs["bert"].paths["fp32"], tmp_path / "small.onnx", precision)
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
    graphs: dict[str, Graphs], precision: str, count: int, tmp_path: Path, monkeypatch, capfd
) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler()] * count
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/none")  # whoever writes there fails
        patch.setattr(logging.root, "handlers", [*handlers])
        patch.setattr(logging.root.manager, "disable", logging.DEBUG)
        quantize(graphs["bert"].paths["fp32"], tmp_path / "small.onnx", precision)
        settings = tempfile.tempdir, logging.root.handlers, logging.root.manager.disable
    assert settings == ("/none", handlers, logging.DEBUG)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
