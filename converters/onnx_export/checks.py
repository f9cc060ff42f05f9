"""What is checked and measured of a written task before its folder appears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from converters.errors import VerificationError
from converters.onnx_export.eval_data import Batch, EvalData, Score, agreement, batches, score_of
from converters.onnx_export.kinds import Kind
from converters.onnx_export.parity import Parity, check_parity
from converters.onnx_export.preprocessing import open_preprocessor
from converters.onnx_export.reference import Reference
from converters.onnx_export.session import Arrays, LoadedAdapter, Session
from converters.onnx_export.task_files import TaskFiles
from converters.onnx_export.task_weights import TaskWeights
from converters.verify import Verification

TORCH = "torch"  # among scores, beside precisions
_REAL_BATCHES = 4  # of eval data, that outputs are compared on


@dataclass(frozen=True)
class TaskCheck:
    """How a task was checked.

    Attributes:
        merged: of the merged weights, against float64.
        parity: of the float32 graph with the merged torch model; None if verification was turned off.
        scores: `torch` and each precision -> how well it does on the eval data.
    """

    merged: Verification
    parity: Parity | None
    scores: Mapping[str, Score] = field(default_factory=dict)

    def agreement(self, precision: str) -> float:
        """Share of the eval data where a graph says what torch says."""
        return agreement(self.scores[precision], self.scores[TORCH])

    def summary(self) -> dict[str, Any]:
        """As the manifest has it."""
        scores = {name: {**score.summary(), "agreement": self.agreement(name)} for name, score in self.scores.items()}
        return {
            "merged": self.merged.summary(),
            "verified": self.parity.summary() if self.parity else None,
            "evaluation": scores or None,
        }


def prepare_eval_data(folder: Path, kind: Kind, config: Mapping[str, Any], data: EvalData | None) -> list[Batch]:
    """The eval data as inputs, by the preprocessor or tokenizer in the output folder."""
    return list(batches(data, open_preprocessor(folder, kind, config))) if data is not None else []


def check_task(
    folder: Path, files: TaskFiles, task: TaskWeights, reference: Reference, prepared: Sequence[Batch], verify: bool
) -> TaskCheck:
    """Check and measure the graphs of a task.

    Raises `VerificationError` when a graph is no valid ONNX, or computes something else than torch.
    """
    parity, scores = None, {}

    def by_torch(inputs: Arrays) -> NDArray[np.float32]:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        output: NDArray[np.float32] = reference.run(tensors, task.tensors).numpy()
        return output

    if prepared:
        scores[TORCH] = score_of(by_torch, prepared)
    for precision, model in files.models.items():
        session = Session(folder / model)
        adapter = LoadedAdapter(folder / files.adapter) if files.adapter else None

        def by_onnx(
            inputs: Arrays, session: Session = session, adapter: LoadedAdapter | None = adapter
        ) -> NDArray[np.float32]:
            return session.run(inputs, adapter)

        if verify:
            _check_valid(folder / model)
        if verify and precision == "fp32":
            real = [
                {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
                for batch in prepared[:_REAL_BATCHES]
            ]
            parity = check_parity(f"{files.task} ({model})", by_onnx, reference, task.tensors, real)
        if prepared:
            scores[precision] = score_of(by_onnx, prepared)
    return TaskCheck(task.verification, parity, scores)


def _check_valid(model: Path) -> None:
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except Exception as error:  # shape inference raises other kinds than the checker
        cause = " ".join(str(error).split())[:300]
        raise VerificationError(f"{model.name} is not valid ONNX: {cause}; nothing was written") from None
