"""Graphs of tasks that untie, resize or pad differently: none gets the graph of another."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny_models import edit_json, tiny_llama

from converters import export_onnx
from converters.errors import ConversionError
from converters.outputs.onnx.options import ExportOptions, Form

IDS = torch.arange(24).reshape(2, 12)
PLAIN = {"target_modules": ["q_proj"]}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]}


def save_base(folder: Path) -> Path:
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=True, hidden_size=16, intermediate_size=24).save_pretrained(folder / "base")
    return folder / "base"


def save_lora(base: Path, folder: Path, **settings: object) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(tf.LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def check(graph: Path, base: Path, adapter: Path) -> None:
    session = onnxruntime.InferenceSession(graph)
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones(IDS.shape, dtype=np.int64)}
    found = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})[0]
    model = PeftModel.from_pretrained(tf.LlamaForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_task_that_unties_the_head_does_not_share_a_graph(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    tasks = [save_lora(base, tmp_path / "plain", **PLAIN), save_lora(base, tmp_path / "head", **HEAD)]
    for form in (Form.SHARED, Form.SELF_MERGING, Form.SWAPPABLE):
        with pytest.raises(
            ConversionError, match=r"tie_word_embeddings is False for head, .* export them separately"
        ):
            export_onnx(base, tasks, tmp_path / form.value, each=True, options=ExportOptions(form=form))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [HEAD, TOKENS], ids=["untied head", "tied tokens"])
@pytest.mark.parametrize("form", [Form.MERGED, Form.SELF_MERGING])
def test_one_task_on_a_tied_base(settings: dict[str, object], form: Form, tmp_path: Path) -> None:
    """The base has one tensor for both ends of the tie, and the graph one name."""
    base = save_base(tmp_path)
    adapter = save_lora(base, tmp_path / "task", **settings)
    export_onnx(base, adapter, tmp_path / "onnx", options=ExportOptions(form=form))
    check(tmp_path / "onnx" / ("model.onnx" if form is Form.MERGED else "task.onnx"), base, adapter)


@pytest.mark.slow
def test_a_head_that_one_task_replaces_and_another_adapts(tmp_path: Path) -> None:
    """Both untie it. The first one, of which the graph is, says nothing of the weight that the second one adapts."""
    base = save_base(tmp_path)
    tasks = [save_lora(base, tmp_path / "replaced", **SAVED), save_lora(base, tmp_path / "adapted", **HEAD)]
    export_onnx(base, tasks, tmp_path / "onnx", each=True, options=ExportOptions(form=Form.SELF_MERGING))
    for task in tasks:
        check(tmp_path / "onnx" / f"{task.name}.onnx", base, task)


@pytest.mark.slow
def test_each_classifier_has_its_own_pad_token(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    tokens = {"[PAD]": 90, "w": 3}
    for name, pad in (("first", "[PAD]"), ("second", "w")):
        model = tf.LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
        config = LoraConfig(r=2, init_lora_weights=False, task_type="SEQ_CLS", target_modules=["q_proj"])
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "w"}}
        (tmp_path / name / "tokenizer.json").write_text("{}")
        edit_json(tmp_path / name / "tokenizer.json", **words, added_tokens=[])
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
        edit_json(tmp_path / name / "tokenizer_config.json", pad_token=pad)
    adapters = [tmp_path / "first", tmp_path / "second"]
    export_onnx(base, adapters, tmp_path / "onnx", each=True)
    ids, mask = IDS.clone() + 5, np.ones(IDS.shape, dtype=np.int64)
    for adapter, pad in zip(adapters, (90, 3), strict=True):
        ids[1, 6:], mask[1, 6:] = pad, 0
        model = tf.LlamaForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=pad)
        with torch.no_grad():
            given = {"input_ids": ids, "attention_mask": torch.from_numpy(mask)}
            expected = PeftModel.from_pretrained(model, adapter).eval()(**given).logits.numpy()
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / adapter.name / "model.onnx")
        found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask})[0]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    with pytest.raises(ConversionError, match="pad_token_id is 3 for second, 90 for first"):
        export_onnx(base, adapters, tmp_path / "one", each=True, options=ExportOptions(form=Form.SHARED))
