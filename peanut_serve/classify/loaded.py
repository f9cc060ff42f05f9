"""A task that passed its checks and can run: its graph in a session, and its adapter if the graph is swappable."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.errors import OptionError
from converters.inference.session import Arrays, LoadedAdapter, Session
from peanut_serve.classify.predictions import check_logits
from peanut_serve.classify.tasks import OnnxTask


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task that can run. Thread-safe: the adapter is an argument of a run, not a state of the session."""

    task: OnnxTask
    session: Session
    adapter: LoadedAdapter | None

    def run_all(self, arrays: Arrays) -> list[NDArray[np.float32]]:
        """Every output of the graph.

        Raises:
            OptionError: an input is missing, or the graph cannot run on the inputs.
            VerificationError: an output has NaN or infinity, or its number of labels differs from the config.
        """
        name, inputs = self.task.name, self.session.inputs
        if missing := [one for one in inputs if one not in arrays]:
            raise OptionError(f"{name} needs the inputs {', '.join(inputs)}; {missing[0]} is missing")
        try:
            found = self.session.run_all(arrays, self.adapter)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            shapes = ", ".join(f"{one} {arrays[one].dtype}{arrays[one].shape}" for one in inputs)
            cause = " ".join(str(error).split())[:300]
            raise OptionError(f"{name} cannot run on {shapes}: {cause}") from None
        for output in found:
            check_logits(output, self.task.labels, name)
        return found


def load_task(
    task: OnnxTask, precision: str, hashes: dict[Path, str], sessions: Mapping[Path, Session], threads: int | None
) -> LoadedTask:
    """Check the files of a task and load it.

    Args:
        task: the task.
        precision: of the graph to run.
        hashes: of files, computed so far; this call adds to them.
        sessions: graph -> session, of those that are open; the task runs in one of them, or in a new one.
        threads: threads of a new session; None for all cores.

    Raises:
        OptionError: the task does not have this precision.
        CheckpointError, VerificationError: a file is missing, damaged, or not the one that was written.
        BaseMismatchError: the graph and the task have different bases.
    """
    model = task.model(precision)
    task.check_files(precision, hashes)
    session = sessions.get(model) or Session(model, threads)
    task.check_graph(session)
    return LoadedTask(task, session, task.load_adapter(session))
