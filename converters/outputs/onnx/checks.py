"""What is checked and measured of a written task before its folder appears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.errors import VerificationError
from converters.evaluation.verify import Verification
from converters.inference.kinds import ModelKind
from converters.inference.preprocessing import open_preprocessor
from converters.inference.session import Arrays, LoadedAdapter, Session
from converters.outputs.onnx.eval_data import Batch, EvalData, Score, agreement, batches, score_of
from converters.outputs.onnx.graphs.reference import Reference
from converters.outputs.onnx.graphs.task_weights import TaskWeights
from converters.outputs.onnx.parity import Parity, check_parity
from converters.outputs.onnx.task_files import TaskFiles

TORCH = "torch"  # among scores, beside precisions
_REAL_BATCHES = 4  # of eval data, that outputs are compared on


@dataclass(frozen=True)
class TaskCheck:
    """How a task was checked.

    Attributes:
        merged: the merged weights, compared with float64.
        parity: the float32 graph, compared with the merged torch model; None if verification was turned off.
        scores: `torch` and each precision -> its score on the eval data.
    """

    merged: Verification
    parity: Parity | None
    scores: Mapping[str, Score] = field(default_factory=dict)

    def agreement(self, precision: str) -> float:
        """Share of the eval data on which a graph predicts what torch predicts."""
        return agreement(self.scores[precision], self.scores[TORCH])

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        scores = {name: {**score.summary(), "agreement": self.agreement(name)} for name, score in self.scores.items()}
        return {
            "merged": self.merged.summary(),
            "verified": self.parity.summary() if self.parity else None,
            "evaluation": scores or None,
        }


def prepare_eval_data(folder: Path, kind: ModelKind, config: Mapping[str, Any], data: EvalData | None) -> list[Batch]:
    """The eval data as inputs, by the preprocessor or tokenizer in the output folder."""
    if data is None:
        return []
    return list(batches(data, open_preprocessor(folder, kind, config), kind.batch_size))


def check_task(
    folder: Path, files: TaskFiles, task: TaskWeights, reference: Reference, prepared: Sequence[Batch], verify: bool
) -> TaskCheck:
    """Check and measure the graphs of a task.

    Raises `VerificationError` when a graph is not valid ONNX, or does not compute what torch does.
    """
    if not verify and not prepared:
        return TaskCheck(task.verification, None)
    parity, scores = None, {}
    if prepared:
        scores[TORCH] = score_of(lambda inputs: _by_torch(reference, task, inputs), prepared)
    for precision, model in files.models.items():
        if verify:
            _check_valid(folder / model)  # before there is a session: each holds the weights twice while it loads
        session = Session(folder / model)
        adapter = LoadedAdapter(folder / files.adapter) if files.adapter else None
        if verify and precision == "fp32":
            real = [_as_tensors(batch.inputs) for batch in prepared[:_REAL_BATCHES]]
            run = partial(session.run_all, adapter=adapter)
            parity = check_parity(f"{files.task} ({model})", run, reference, task.tensors, real)
        if prepared:
            scores[precision] = score_of(partial(session.run, adapter=adapter), prepared)
    return TaskCheck(task.verification, parity, scores)


def _by_torch(reference: Reference, task: TaskWeights, inputs: Arrays) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = reference.run(_as_tensors(inputs), task.tensors)[0].numpy()
    return logits


def _as_tensors(inputs: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def _check_valid(model: Path) -> None:
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except Exception as error:  # shape inference raises other kinds than the checker
        cause = " ".join(str(error).split())[:300]
        raise VerificationError(f"{model.name} is not valid ONNX: {cause}; nothing was written") from None
