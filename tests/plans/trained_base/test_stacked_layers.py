"""`layer_replication`: merged models with stacked layers against PEFT's unmerged logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.tiny_models import edit_config, tiny_llama

from converters import load_adapter, merge, merge_each, prepare_merge
from converters.api.exporting import export_onnx
from converters.errors import AdapterConfigError, BaseMismatchError, OptionError, TargetError
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 96}
HEADS = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


def llama() -> tf.PreTrainedModel:
    return tiny_llama(num_hidden_layers=3, hidden_size=16, intermediate_size=24)


def bert() -> tf.PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_hidden_layers=3, max_position_embeddings=32))


def mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=2, num_local_experts=2)
    )


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2Model(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, n_positions=32))


def qwen3() -> tf.PreTrainedModel:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**HEADS, num_hidden_layers=2))


def gemma2(layers: int = 4) -> tf.PreTrainedModel:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**HEADS, num_hidden_layers=layers, sliding_window=4))


Make = Callable[[], tf.PreTrainedModel]


def train(make: Make, ranges: list[list[int]], folder: Path, **settings: object) -> Path:
    """Save a base, and a LoRA on a stack of its layers."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder / "base")
    defaults: dict[str, Any] = {"r": 2, "init_lora_weights": False, "layer_replication": ranges}
    get_peft_model(model, LoraConfig(**{**defaults, **settings})).save_pretrained(folder / "adapter")
    return folder / "adapter"


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(24).reshape(2, 12), use_cache=False)
    return output.logits if "logits" in output else output.last_hidden_state


def run_bert(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(2, 12)).logits


def in_peft(make: Make, folder: Path, adapter: Path | None = None) -> torch.Tensor:
    base = type(make()).from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter or folder / "adapter")
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:  # PEFT leaves the list as it is, and transformers finds it too short
        model.config.layer_types = kinds * 4
    return run_bert(model) if make is bert else run(model)


CASES: dict[str, tuple[Make, list[list[int]], dict[str, object], int]] = {
    "llama": (llama, [[0, 2], [1, 3]], {"target_modules": ["q_proj", "down_proj"]}, 4),
    "llama with fewer": (llama, [[2, 3], [0, 1]], {"target_modules": ["q_proj"]}, 2),
    "llama in part": (llama, [[0, 3], [1, 3]], {"target_modules": ["q_proj"], "layers_to_transform": [3, 4]}, 5),
    "bert": (
        bert,
        [[0, 2], [1, 3]],
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        4,
    ),
    "bert's head alone": (
        bert,
        [[0, 2], [1, 3]],
        {"target_modules": "dummy-target-modules", "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        4,
    ),
    "gpt2": (gpt2, [[0, 2], [0, 1]], {"target_modules": ["c_attn"]}, 3),
    "mixtral": (mixtral, [[0, 2], [1, 2]], {"target_modules": ["q_proj"]}, 3),
    "qwen3": (qwen3, [[0, 2], [0, 2]], {"target_modules": ["q_proj"]}, 4),
    "gemma2": (gemma2, [[0, 4], [2, 4]], {"target_modules": ["q_proj"]}, 6),
    "gemma2 with as many": (gemma2, [[0, 2], [0, 2]], {"target_modules": ["q_proj"]}, 4),
}


FAST = ("llama", "bert")


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_merged_logits_are_those_of_peft(tmp_path: Path, case: str) -> None:
    make, ranges, settings, count = CASES[case]
    adapter = train(make, ranges, tmp_path, **settings)
    result = merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = type(make()).from_pretrained(tmp_path / "merged")
    assert merged.config.num_hidden_layers == count
    assert len(getattr(merged.config, "layer_types", None) or range(count)) == count
    found = run_bert(merged) if make is bert else run(merged)
    expected = in_peft(make, tmp_path)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert any(f"become {count}, stacked as layer_replication {ranges} says" in note for note in result.plan.notes)
    manifest = json.loads((tmp_path / "merged" / "peanut_manifest.json").read_text())
    assert manifest["base"]["changed_before_training"] == {"layer_replication": ranges}
    assert manifest["base"]["fingerprint"] == prepare_merge(tmp_path / "base", adapter).base.original.fingerprint


@pytest.mark.slow
def test_a_graph_of_stacked_layers(tmp_path: Path) -> None:
    """ONNX Runtime against PEFT: the graph has the stack, and each layer its own copy of the weights."""
    settings, folder = (
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        tmp_path,
    )
    adapter = train(bert, [[0, 2], [1, 3]], folder, **settings)
    export_onnx(folder / "base", adapter, folder / "onnx")
    ids = np.arange(24).reshape(2, 12)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    graph = onnxruntime.InferenceSession(next((folder / "onnx").rglob("model.onnx")))
    found = torch.from_numpy(graph.run(None, inputs)[0])
    expected = in_peft(bert, folder)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_file_of_the_base_is_not_copied_as_a_shard(tmp_path: Path) -> None:
    """Its layers have other names, though not one of them is changed."""
    torch.manual_seed(0)
    adapter = train(llama, [[0, 1], [2, 3], [1, 2]], tmp_path, target_modules=["q_proj"], layers_to_transform=[0])
    llama().save_pretrained(tmp_path / "base", max_shard_size="12KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    merge(tmp_path / "base", adapter, tmp_path / "merged", max_shard_size="base", share=True)
    base, merged = (
        {name: t for file in (tmp_path / folder).glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in ("base", "merged")
    )
    for new, old in ((1, 2), (2, 1)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(merged[name.format(new)], base[name.format(old)])


def test_as_lora_the_stack_is_in_the_config(tmp_path: Path) -> None:
    adapter = train(llama, [[0, 2], [1, 3]], tmp_path, target_modules=["q_proj"])
    planned = plan_lora_adapter(prepare_merge(tmp_path / "base", adapter), tmp_path / "lora")
    write_lora_adapter(planned)
    expected = in_peft(llama, tmp_path)
    found = in_peft(llama, tmp_path, tmp_path / "lora")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert any("stacked layers" in reason for reason in planned.vllm_refuses)
    assert load_adapter(tmp_path / "lora").layer_replication == ((0, 2), (1, 3))


def test_the_stack_is_a_part_of_the_digest(tmp_path: Path) -> None:
    adapter = train(llama, [[0, 2], [1, 3]], tmp_path, target_modules=["q_proj"])
    digest = load_adapter(adapter).digest
    edit_config(adapter, layer_replication=[[0, 1], [0, 3]])
    assert load_adapter(adapter).digest != digest


REFUSED = {
    "beyond": ([[0, 2], [1, 4]], AdapterConfigError, r"layer_replication has \[1, 4\], and the base has 3 layers"),
    "empty": ([[1, 1], [0, 3], [0, 1]], AdapterConfigError, r"layer_replication has \[1, 1\]"),
    "form": ([[0, 1, 2]], AdapterConfigError, r"expected a list of pairs \[start, end\]"),
    "word": ("all", AdapterConfigError, r"layer_replication = 'all'; expected a list of pairs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_stack_of_the_base_is_refused(tmp_path: Path, case: str) -> None:
    given, error, message = REFUSED[case]
    adapter = train(llama, [[0, 2], [1, 3]], tmp_path, target_modules=["q_proj"])
    edit_config(adapter, layer_replication=given)
    with pytest.raises(error, match=message):
        prepare_merge(tmp_path / "base", adapter)


@pytest.mark.slow
def test_layers_whose_kind_follows_from_their_place_are_refused(tmp_path: Path) -> None:
    """PEFT on today's transformers takes the masks by place, and the windows from the copied layer."""
    adapter = train(gemma2, [[0, 2], [1, 3]], tmp_path, target_modules=["q_proj"])
    with pytest.raises(TargetError, match="the layers of the base are of several kinds .layer_types."):
        prepare_merge(tmp_path / "base", adapter)
    config = tmp_path / "base" / "config.json"
    settings = json.loads(config.read_text())
    settings.pop("layer_types")  # older configs imply it
    config.write_text(json.dumps(settings))
    with pytest.raises(TargetError, match="would be built otherwise by Gemma2ForCausalLM"):
        prepare_merge(tmp_path / "base", adapter)


def test_where_layers_cannot_be_stacked_it_is_said(tmp_path: Path) -> None:
    adapter = train(llama, [[0, 2], [1, 3]], tmp_path / "a", target_modules=["q_proj"])
    plain = train(llama, [], tmp_path / "b", target_modules=["q_proj"])
    base = tmp_path / "a" / "base"
    with pytest.raises(OptionError, match="another adapter on a different one, or on the base as it is"):
        prepare_merge(base, [adapter, plain])
    with pytest.raises(OptionError, match="layers were stacked .* several outputs are made of one base as it is"):
        merge_each(base, [plain, adapter], tmp_path / "outputs")


def test_the_base_as_it_was_merged_is_not_stacked_again(tmp_path: Path) -> None:
    adapter = train(llama, [[0, 2], [1, 3]], tmp_path, target_modules=["q_proj"])
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    with pytest.raises((BaseMismatchError, Exception), match="already contain an adapter"):
        prepare_merge(tmp_path / "merged", adapter)
