"""The engines of the exports that a fleet of classifiers serves, with the checks that need no graph."""

from converters.errors import OptionError
from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.classify.serving.preparing import SERVED
from peanut_serve.ray.classifiers.settings import ClassifierSettings


def open_engines(settings: ClassifierSettings) -> dict[str, OnnxEngine]:
    """Name of a task -> the engine that has it. No graph is loaded yet.

    Raises:
        CheckpointError: a folder is not an ONNX export.
        OptionError: two folders have a task of the same name; a task is of a kind that is not served, or is not there
            in this precision.
    """
    engines: dict[str, OnnxEngine] = {}
    for folder in settings.folders:
        engine = OnnxEngine(folder, precision=settings.precision, threads=max(1, int(settings.cpus)))
        for name, task in engine.tasks.items():
            if name in engines:
                raise OptionError(f"{folder} has a task {name}, and so has another folder; rename one of them")
            if task.kind.task not in SERVED:
                known = ", ".join(SERVED)
                raise OptionError(f"{folder}: {name} does {task.kind.task}, which is not served; expected {known}")
            task.model(settings.precision)
            engines[name] = engine
    return engines
