"""The Open Inference Protocol (v2) of KServe and Triton: metadata of tasks, and inference.

An input is either BYTES, named `image` or `sound` (content of a file) or `text`, which the server preprocesses; or
the tensors of the graph, which the client prepared: not those of sounds, and always those of questions, as the
protocol has no pairs of texts. The version of a model is the digest of a task's version.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import OptionError
from peanut_serve.classify.http.tensors import Request, read_request, write_response
from peanut_serve.classify.predictions import function_for, scores
from peanut_serve.classify.serving.results import Inferred, as_matrix
from peanut_serve.classify.serving.rows import is_by_token
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.classify.serving.version import TaskVersion
from peanut_serve.classify.tasks import OnnxTask
from peanut_serve.errors import RequestBodyError, shown

_LARGE = 64 << 10  # bytes of a body that is read beside the loop
_SCORES, _LENGTHS = "scores", "lengths"
_CLASSIFIERS = ("image-classification", "audio-classification", "text-classification")
_INPUTS: dict[str, tuple[str, list[int]]] = {"pixel_values": ("FP32", [-1, -1, -1, -1])}


def metadata(version: TaskVersion) -> dict[str, Any]:
    """What the protocol says of a model. `tensor_inputs` are what may be sent instead of `inputs`."""
    task = version.task
    own = _bytes_input(task)
    tensors = [_described(name, *_INPUTS.get(name, ("INT64", [-1, -1]))) for name in task.kind.inputs]
    return {
        "name": version.name,
        "versions": [version.digest],
        "platform": "onnxruntime_onnx",
        "inputs": tensors if own is None else [_described(own, "BYTES", [-1])],
        "outputs": [_described(name, *_output(task, name)) for name in _outputs(task)],
        "parameters": {
            "task": task.kind.task,
            "labels": list(task.labels),
            "tensor_inputs": [] if own == "sound" else tensors,
        },
    }


def _described(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _bytes_input(task: OnnxTask) -> str | None:
    """The input of BYTES; None for questions, which are pairs of texts."""
    if task.kind.task == "question-answering":
        return None
    if not task.kind.takes_files:
        return "text"
    return "image" if task.kind.inputs == ("pixel_values",) else "sound"


def _outputs(task: OnnxTask) -> list[str]:
    more = [_SCORES] if task.kind.task in _CLASSIFIERS else [_LENGTHS] if is_by_token(task.kind) else []
    return [*task.kind.outputs, *more]


def _output(task: OnnxTask, name: str) -> tuple[str, list[int]]:
    if name == _LENGTHS:
        return "INT64", [-1]
    width = [] if task.kind.task == "question-answering" else [len(task.labels) or -1]
    return "FP32", [-1, *([-1] if is_by_token(task.kind) else []), *width]


async def infer(
    server: TaskServer, version: TaskVersion, body: bytes, header: str | None, digest: str | None
) -> tuple[Inferred, bytes, int | None]:
    """Answer a request for a task.

    Args:
        server: that has the task.
        version: of the task, whose kind says what BYTES are.
        body: of the request.
        header: where its JSON ends, if it has binary tensors.
        digest: of the version that the client wants, if it does.

    Returns the outputs, the body of the response, and where its JSON ends. Raises `RequestBodyError` and what
    `TaskServer.predict` raises.
    """
    images = version.task.kind.takes_files
    if len(body) > _LARGE:
        request = await asyncio.to_thread(read_request, body, header, images)
    else:
        request = read_request(body, header, images)
    _check_outputs(request, version.task)
    found = await _run(server, version, request, digest)
    if sum(output.size for row in found.rows for output in row) > _LARGE:
        return found, *await asyncio.to_thread(_respond, request, found)
    return found, *_respond(request, found)


def _check_outputs(request: Request, task: OnnxTask) -> None:
    known = _outputs(task)
    for name, own in request.outputs.items():
        if name not in known:
            raise RequestBodyError(f"{task.name} has no output {shown(name)}; it has {', '.join(known)}")
        classes = own.get("classification", 0)
        if type(classes) is not int or classes < 0 or (classes and (task.kind.task not in _CLASSIFIERS)):
            raise RequestBodyError(
                f"classification of {name} is {shown(str(classes))}, which {task.name} cannot give"
            )


async def _run(server: TaskServer, version: TaskVersion, request: Request, digest: str | None) -> Inferred:
    task, name = version.task, version.name
    own = _bytes_input(task)
    if own is None or own not in request.tensors:
        wrong = [one for one, tensor in request.tensors.items() if isinstance(tensor, list)]
        if wrong:
            bytes_as = f"BYTES as {own}, or " if own is not None else ""
            raise OptionError(f"{name} takes {bytes_as}{', '.join(task.kind.inputs)}; found {shown(wrong[0])}")
        arrays = {key: tensor for key, tensor in request.tensors.items() if isinstance(tensor, np.ndarray)}
        return await server.infer(name, arrays, digest)
    given = request.tensors[own]
    if len(request.tensors) > 1 or not isinstance(given, list):
        raise OptionError(f"{own} is BYTES, and the only input; found {', '.join(map(shown, request.tensors))}")
    if task.kind.takes_files:
        return await server.outputs(name, given, digest)
    try:
        return await server.outputs(name, [one.decode() for one in given], digest)
    except UnicodeDecodeError as error:
        raise RequestBodyError(f"a text is not UTF-8 ({error.reason})") from None


def _respond(request: Request, found: Inferred) -> tuple[bytes, int | None]:
    version = found.version
    wanted = request.outputs or {name: {} for name in _outputs(version.task)}
    tensors: dict[str, NDArray[Any] | list[bytes]] = {}
    shapes: dict[str, Sequence[int]] = {}
    for name, own in wanted.items():
        tensor = _tensor(version.task, found, name)
        tensors[name], shapes[name] = tensor, tensor.shape
        if classes := min(own.get("classification", 0), len(version.task.labels)):
            tensors[name] = _classes(tensor, version.task.labels, classes)
            shapes[name] = (len(tensor), classes)
    binary: Mapping[str, bool] = {
        name: own.get("binary_data", request.is_binary) is True for name, own in wanted.items()
    }
    facts = {"model_name": version.name, "model_version": version.digest}
    return write_response({**facts, **({"id": request.id} if request.id else {})}, tensors, shapes, binary)


def _tensor(task: OnnxTask, found: Inferred, name: str) -> NDArray[Any]:
    if name == _LENGTHS:
        return np.array([row[0].shape[1] for row in found.rows], np.int64)
    if name == _SCORES:
        function = function_for(task.labels, task.problem_type)
        return np.stack([scores(row[0][0], function) for row in found.rows]).astype(np.float32)
    return as_matrix(found.rows, task.kind.outputs.index(name))


def _classes(values: NDArray[np.float32], labels: Sequence[str], count: int) -> list[bytes]:
    """Triton's classification extension: `value:index:label` of the best classes of each row."""
    best = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return [f"{row[i]:f}:{i}:{labels[i]}".encode() for row, order in zip(values, best, strict=True) for i in order]
