"""Graphs whose weights are written past protobuf are what protobuf would have written."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from torch import Tensor

from converters.outputs.onnx.graphs.model_file import declared, save_model


def adding(weights: dict[str, Tensor]) -> ModelProto:
    """A graph that adds all of its weights, which have one length or are scalars, to its input."""
    length = max(tensor.numel() for tensor in weights.values())
    total, nodes = "x", []
    for index, name in enumerate(weights):
        nodes.append(make_node("Add", [total, name], [f"sum{index}"]))
        total = f"sum{index}"
    sides = [[make_tensor_value_info(name, TensorProto.FLOAT, [length])] for name in ("x", total)]
    graph = make_graph(nodes, "adding", *sides, [declared(name, tensor) for name, tensor in weights.items()])
    model = make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=10)
    onnx.helper.set_model_props(model, {"what": "a sum"})
    return model


LARGE = pytest.param(67_108_865, marks=pytest.mark.slow)


# lengths in bytes whose encodings take one to five bytes of seven bits, and their neighbours
@pytest.mark.parametrize("numel", [1, 30, 31, 32, 4095, 4096, 524_286, 524_288, LARGE])
def test_the_file_says_what_protobuf_would(tmp_path: Path, numel: int) -> None:
    weights = {"scalar": torch.tensor(2.0), "grown": torch.arange(numel, dtype=torch.float32)}
    model = adding(weights)
    save_model(tmp_path / "model.onnx", model, weights)
    found = onnx.load(tmp_path / "model.onnx")
    for initializer in model.graph.initializer:
        initializer.raw_data = weights[initializer.name].numpy().tobytes()
    assert found == model
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (total,) = session.run(None, {"x": np.ones(numel, np.float32)})
    np.testing.assert_array_equal(total, weights["grown"].numpy() + np.float32(3))


def test_initializers_that_hold_numbers_keep_them(tmp_path: Path) -> None:
    """And those that hold none, like the low-rank inputs of a swappable graph, get none."""
    weights = {"one": torch.ones(3), "view": torch.arange(6.0).view(3, 2).T[1]}
    model = adding({**weights, "own": torch.zeros(3)})
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.full(3, 5, np.float32), "own"))
    model.graph.initializer.append(TensorProto(name="empty", dims=(4, 0), data_type=TensorProto.FLOAT))
    save_model(tmp_path / "model.onnx", model, weights)
    found = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert list(found) == ["one", "view", "own", "empty"]
    np.testing.assert_array_equal(found["view"], [1, 3, 5])  # not contiguous in memory
    np.testing.assert_array_equal(found["own"], [5, 5, 5])
    assert found["empty"].shape == (4, 0)


def test_weights_are_not_copied(tmp_path: Path) -> None:
    weights = {"large": torch.ones(25_000_000)}
    model = adding(weights)
    tracemalloc.start()
    try:
        save_model(tmp_path / "model.onnx", model, weights)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert (tmp_path / "model.onnx").stat().st_size > 100_000_000


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(FileExistsError):
        save_model(tmp_path / "model.onnx", adding({"one": torch.ones(1)}), {})
    assert (tmp_path / "model.onnx").read_text() == "mine"
