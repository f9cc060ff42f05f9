"""Which ONNX opsets can be written and run."""

import onnx
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from converters.errors import OptionError
from converters.inference.runtime import onnxruntime
from converters.outputs.onnx.options import DEFAULT_OPSET

_MOST = (1 << 31) - 1  # that a model can name


def check_opset(opset: int) -> None:
    """Raise `OptionError` for an opset that torch does not write, or the installed ONNX Runtime does not run."""
    if opset < DEFAULT_OPSET:
        raise OptionError(f"opset={opset} is older than what torch writes; expected {DEFAULT_OPSET} or newer")
    if not _runs(opset):
        newest = next(known for known in range(onnx.defs.onnx_opset_version(), 0, -1) if _runs(known))
        raise OptionError(
            f"opset={opset} cannot be run by ONNX Runtime {onnxruntime.__version__}, which supports opsets up to "
            f"{newest}; leave out opset= for {DEFAULT_OPSET}, which runs nearly everywhere"
        )


def _runs(opset: int) -> bool:
    """Whether ONNX Runtime loads the smallest graph of this opset."""
    if opset > _MOST:
        return False
    value = [make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = make_graph([make_node("Identity", ["x"], ["y"])], "smallest", value[:1], value[1:])
    model = make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=10)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # its exceptions have no common base
        return False
    return True
