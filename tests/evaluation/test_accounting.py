"""Verification compares an output with what it was made from: what is dropped or altered on the way is found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_models import save_adapter, tiny_llama
from torch import Tensor

import converters.outputs.onnx.write as onnx_output
import converters.outputs.peft as peft_output
from converters import prepare_merge
from converters.errors import VerificationError
from converters.evaluation.accounting import check_file, check_plan
from converters.files.writer import ShardWriter
from converters.outputs.checkpoint.write import run_merge
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter
from converters.outputs.onnx.options import ExportOptions
from converters.outputs.onnx.plan import plan_export
from converters.outputs.onnx.write import run_export
from converters.outputs.peft import plan_peft_adapter, write_peft_adapter
from converters.plans.merge import Plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("accounting")
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(folder / "base")
    save_adapter(model, folder / "adapter", modules_to_save=["lm_head"])
    return prepare_merge(folder / "base", folder / "adapter", dtype="fp32")


def test_a_module_or_tensor_that_is_not_planned_is_found(plan: Plan) -> None:
    check_plan(plan)
    for lost, message in [("q_proj", "θ of .*q_proj"), ("lm_head", "lm_head"), ("up_proj", "up_proj.* of the base")]:
        shards = {file: tuple(t for t in tensors if lost not in t.name) for file, tensors in plan.shards.items()}
        with pytest.raises(VerificationError, match=f"{message}.* is in none of the planned tensors"):
            check_plan(replace(plan, shards=shards))


def test_a_merged_checkpoint_without_a_module(plan: Plan, tmp_path: Path) -> None:
    def unchanged(shard: str) -> tuple[object, ...]:
        return tuple(replace(t, terms=()) if "v_proj" in t.name else t for t in plan.shards[shard])

    lost = replace(plan, shards={shard: unchanged(shard) for shard in plan.shards})
    with pytest.raises(VerificationError, match=r"θ of .*v_proj is in none"):
        run_merge(lost, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_adapter_without_a_module(plan: Plan, tmp_path: Path) -> None:
    whole = plan_lora_adapter(plan, tmp_path / "out")
    for part in ("modules", "saved"):
        kept = dict(list(getattr(whole, part).items())[1:])
        with pytest.raises(VerificationError, match=r"the LoRA adapter: 1 \(.*\) missing, 0 too many, of 3 planned"):
            write_lora_adapter(replace(whole, **{part: kept}))
    assert not (tmp_path / "out").exists()


def test_a_peft_adapter_without_a_module(plan: Plan, tmp_path: Path) -> None:
    whole = plan_peft_adapter(plan, tmp_path / "out")
    for part in ("modules", "saved"):
        kept = dict(list(getattr(whole, part).items())[1:])
        with pytest.raises(VerificationError, match=r"the PEFT adapter: 1 \(.*\) missing, 0 too many, of 3 planned"):
            write_peft_adapter(replace(whole, **{part: kept}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["q_proj", "lm_head"])
@pytest.mark.parametrize("form", ["merged", "lora"])
def test_an_altered_number_is_found(
    form: str, name: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter.write

    def altered(self: ShardWriter, tensor: str, start: int, piece: Tensor) -> None:
        write(self, tensor, start, piece * 1.01 if name in tensor else piece)

    monkeypatch.setattr(ShardWriter, "write", altered)
    with pytest.raises(VerificationError, match=name):
        if form == "merged":
            run_merge(plan, tmp_path / "out")
        else:
            write_lora_adapter(plan_lora_adapter(plan, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["q_proj", "lm_head"])
def test_an_altered_number_of_a_peft_adapter_is_found(
    name: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Callable[..., None] = peft_output.save_tensors

    def altered(tensors: dict[str, Tensor], *rest: object, **options: object) -> None:
        save({key: one * 1.01 if name in key else one for key, one in tensors.items()}, *rest, **options)

    monkeypatch.setattr(peft_output, "save_tensors", altered)
    with pytest.raises(VerificationError, match=rf"{name}.* was not written as it should be"):
        write_peft_adapter(plan_peft_adapter(plan, tmp_path / "out"))


@pytest.mark.slow  # it traces a model
def test_a_graph_without_a_module(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = onnx_output.evaluate_task

    def lost(*given: object) -> object:
        task = evaluate(*given)
        kept = {name for name in task.tensors if "q_proj" not in name}
        return replace(
            task,
            tensors={name: one for name, one in task.tensors.items() if name in kept},
            updated={name: one for name, one in task.updated.items() if name in kept},
        )

    monkeypatch.setattr(onnx_output, "evaluate_task", lost)
    with pytest.raises(VerificationError, match=r"the ONNX graph: 1 \(.*q_proj\.weight\) missing"):
        run_export(plan_export([plan], tmp_path / "out", ExportOptions()))


def test_names_and_shapes_of_a_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    check_file(tmp_path / "x.safetensors", {"a": (2, 3)})
    with pytest.raises(VerificationError, match=r"a was written as \(2, 3\), expected \(3, 2\)"):
        check_file(tmp_path / "x.safetensors", {"a": (3, 2)})
    with pytest.raises(VerificationError, match=r"1 \(b\) missing, 0 too many"):
        check_file(tmp_path / "x.safetensors", {"a": (2, 3), "b": (1,)})
