"""LoRA adapters are bound to weights: a worker loads none that belongs to other weights than the model has.

The server gives every pair of a variant and a resident a LoRA adapter of its own, and the engine requests with the
one for the weights that it has. This is the last check of that, where the arithmetic is: an adapter says in its
manifest which merged weights it is added to (`peanut_serve/lora/complement.py`), and those that say nothing belong to
the base's. When the weights change, a worker forgets all adapters, so that every one of them passes this check again.
An adapter of other weights ends the step with an error, and the engine with it, which the server restarts; it never
gives an answer.
"""

from functools import wraps
from pathlib import Path
from typing import Any

from converters.errors import PeanutError
from converters.serving import MANIFEST_NAME, read_json
from peanut_serve.lora.complement import RESIDENT

_bound: list[str | None] = [None]  # digest of the merged weights that the model of this process has


class BoundAdapterError(PeanutError):
    """A LoRA adapter belongs to other weights than the model has."""


def bind(resident: str | None) -> None:
    """Let vLLM load only adapters of these merged weights in this process from now on; None for those of the base."""
    _check_adapters()
    _bound[0] = resident


def check(folder: Path) -> None:
    """Raise `BoundAdapterError` if the LoRA adapter in a folder belongs to other weights than the model has."""
    file = folder / MANIFEST_NAME
    found = read_json(file, "manifest").get(RESIDENT) if file.is_file() else None
    if found != _bound[0]:
        raise BoundAdapterError(
            f"the LoRA adapter {folder.name} belongs to {_named(found)}, but the model has {_named(_bound[0])}: it "
            "was not loaded; please report how it was asked for"
        )


def _named(resident: str | None) -> str:
    return f"the merged weights {resident[:12]}" if resident is not None else "the base's weights"


def _check_adapters() -> None:
    """Check every adapter that vLLM loads (`vllm/lora/worker_manager.py`)."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def load_checked(self: WorkerLoRAManager, lora_request: Any) -> Any:
        """Replaces `WorkerLoRAManager._load_adapter`."""
        check(Path(lora_request.lora_path))
        return load(self, lora_request)

    setattr(WorkerLoRAManager, "_load_adapter", load_checked)  # noqa: B010
