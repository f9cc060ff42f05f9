"""A worker loads no LoRA adapter of other weights than its model has."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.lora.worker_manager import WorkerLoRAManager

from peanut_serve.vllm_plugin import binding
from peanut_serve.vllm_plugin.binding import BoundAdapterError, bind
from peanut_serve.vllm_plugin.swap.worker import VariantWorker

pytestmark = pytest.mark.slow  # vLLM is imported

ONE, OTHER = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What vLLM's own function was asked to load."""
    found: list[str] = []

    def load(self: WorkerLoRAManager, lora_request: SimpleNamespace) -> str:
        found.append(Path(lora_request.lora_path).name)
        return found[-1]

    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", load)
    monkeypatch.setattr(binding, "_bound", [None])
    yield found


def adapter(folder: Path, resident: str | None = None) -> SimpleNamespace:
    folder.mkdir()
    named = {} if resident is None else {"resident": resident}
    (folder / "peanut_manifest.json").write_text(json.dumps({"format": "lora", **named}))
    return SimpleNamespace(lora_path=str(folder))


def test_only_those_of_the_weights_are_loaded(tmp_path: Path, loaded: list[str]) -> None:
    plain, one, other = (
        adapter(tmp_path / "plain"),
        adapter(tmp_path / "one", ONE),
        adapter(tmp_path / "other", OTHER),
    )
    (tmp_path / "foreign").mkdir()
    foreign = SimpleNamespace(lora_path=str(tmp_path / "foreign"))  # without a manifest, as `vllm serve` may have it
    manager = object.__new__(WorkerLoRAManager)
    bind(None)
    assert [manager._load_adapter(request) for request in (plain, foreign)] == ["plain", "foreign"]
    with pytest.raises(
        BoundAdapterError, match="one belongs to the merged weights 1{12}, but the model has the base's"
    ):
        manager._load_adapter(one)
    bind(ONE)
    assert manager._load_adapter(one) == "one"
    for request in (plain, other, foreign):
        with pytest.raises(BoundAdapterError, match="but the model has the merged weights 1{12}: it was not loaded"):
            manager._load_adapter(request)
    bind(OTHER)
    assert manager._load_adapter(other) == "other"
    assert loaded == ["plain", "foreign", "one", "other"]


def test_a_worker_forgets_all_adapters(loaded: list[str]) -> None:
    calls: list[str] = []
    manager = SimpleNamespace(remove_all_adapters=lambda: calls.append("removed"))
    worker = VariantWorker()
    worker.model_runner = SimpleNamespace(lora_manager=manager)
    worker.peanut_bind(ONE)
    assert (calls, binding._bound) == (["removed"], [ONE])


def test_the_check_is_made_once(tmp_path: Path, loaded: list[str]) -> None:
    bind(ONE)
    function = WorkerLoRAManager._load_adapter
    bind(OTHER)
    assert WorkerLoRAManager._load_adapter is function
