"""Modules that are replaced whole are found as PEFT finds them, by the endings of their names."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support.tiny_models import edit_weights, tiny_llama
from support.zoo import ENCODER, IDS, VISION

from converters import Weighted, load_adapter, merge, prepare_merge
from converters.errors import PeanutError
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter
from converters.outputs.peft import plan_peft_adapter, write_peft_adapter


@dataclass(frozen=True)
class Case:
    """A model, and an adapter of it."""

    model: Callable[[], tf.PreTrainedModel]
    config: Callable[[], peft.PeftConfig]
    replaced: set[str]  # some of what is replaced


def levit() -> tf.PreTrainedModel:
    """Its heads have batch norms."""
    sizes = {"hidden_sizes": [16] * 3, "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [8] * 3}
    return tf.LevitForImageClassificationWithTeacher(tf.LevitConfig(image_size=64, num_labels=3, **sizes))


def distilbert() -> tf.PreTrainedModel:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 96}
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(num_labels=3, **sizes))


def roberta() -> tf.PreTrainedModel:
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER))


def bert(kind: str) -> Callable[[], tf.PreTrainedModel]:
    sizes = {**ENCODER, "num_hidden_layers": 1, "num_labels": 2}
    return lambda: getattr(tf, f"BertFor{kind}")(tf.BertConfig(**sizes))


def deit() -> tf.PreTrainedModel:
    return tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**VISION, num_labels=3))


def peanut(targets: list[str], saved: list[str] | None = None, task_type: str | None = None) -> peft.PeftConfig:
    return peft.PeanutConfig(r=2, target_modules=targets, modules_to_save=saved, task_type=task_type)


CASES = {
    "distilbert": Case(
        distilbert, lambda: peanut(["q_lin"], task_type="SEQ_CLS"), {"pre_classifier.weight", "classifier.bias"}
    ),
    "deit": Case(
        deit, lambda: peanut(["q_proj"], ["classifier"]), {"cls_classifier.bias", "distillation_classifier.weight"}
    ),
    "longlora": Case(
        tiny_llama,
        lambda: peanut(["q_proj"], ["embed_tokens", "norm"], "CAUSAL_LM"),
        {"model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"},
    ),
    "roberta": Case(roberta, lambda: peanut(["query"], task_type="SEQ_CLS"), {"classifier.out_proj.weight"}),
    "biases": Case(
        roberta,
        lambda: peft.LoraConfig(r=2, target_modules=["query", "intermediate.dense"], bias="all", task_type="SEQ_CLS"),
        {"classifier.dense.bias", "roberta.embeddings.LayerNorm.bias"},
    ),
    "part of a head": Case(roberta, lambda: peanut(["query"], ["out_proj"]), {"classifier.out_proj.bias"}),
    "pooler": Case(
        bert("SequenceClassification"),
        lambda: peanut(["query"], ["pooler"], "SEQ_CLS"),
        {"bert.pooler.dense.weight", "classifier.weight"},
    ),
    "questions": Case(
        bert("QuestionAnswering"), lambda: peanut(["query"], task_type="QUESTION_ANS"), {"qa_outputs.weight"}
    ),
    "masked": Case(
        bert("MaskedLM"), lambda: peanut(["query"], ["cls"]), {"cls.predictions.transform.LayerNorm.weight"}
    ),
    "batch norms": Case(
        levit,
        lambda: peft.LoraConfig(r=2, target_modules=["linear"], modules_to_save=["classifier", "classifier_distill"]),
        {"classifier.batch_norm.running_var", "classifier_distill.batch_norm.num_batches_tracked"},
    ),
}  # fmt: skip


def trained(case: Case, folder: Path) -> peft.PeftModel:
    """Save its base and adapter in `folder`, every trained number and every statistic changed."""
    torch.manual_seed(3)
    model = case.model()
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, case.config()).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in adapted.named_buffers():
            if "modules_to_save" in name and name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                buffer.add_(torch.ones_like(buffer) * 3)
    adapted.save_pretrained(folder / "adapter")
    return adapted


def answers(model: torch.nn.Module) -> torch.Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    sides = 64 if isinstance(inner, tf.LevitForImageClassificationWithTeacher) else 16
    pixels = torch.randn(2, 3, sides, sides, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = model(pixel_values=pixels) if inner.main_input_name == "pixel_values" else model(input_ids=IDS)
    return torch.cat([found.start_logits, found.end_logits]) if "start_logits" in found else found.logits


def reloaded(case: Case, base: Path, adapter: Path) -> torch.Tensor:
    """What PEFT computes with an adapter on disk, unmerged."""
    return answers(peft.PeftModel.from_pretrained(type(case.model()).from_pretrained(base), adapter).eval())


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())


SLOW = ("pooler", "questions", "masked", "biases", "deit")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_merged_equals_unmerged_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trained(case, tmp_path)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    model_class = type(case.model())
    merged, info = model_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    wanted = reloaded(case, tmp_path / "base", tmp_path / "adapter")
    assert not any(info.values())
    assert close(answers(merged.eval()), wanted)
    assert not close(answers(model_class.from_pretrained(tmp_path / "base").eval()), wanted)
    assert case.replaced <= set(load_adapter(tmp_path / "adapter").saved)
    for key, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32)


@pytest.mark.parametrize("name", ["biases", pytest.param("batch norms", marks=pytest.mark.slow)])
def test_a_state_dict_in_memory_is_the_same_adapter(name: str, tmp_path: Path) -> None:
    adapted = trained(CASES[name], tmp_path)
    (tmp_path / "state").mkdir()
    torch.save(adapted.state_dict(), tmp_path / "state" / "adapter_model.bin")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path / "state")
    assert load_adapter(tmp_path / "state").digest == load_adapter(tmp_path / "adapter").digest
    files = [tmp_path / f"{kind}-merged" / "model.safetensors" for kind in ("adapter", "state")]
    for kind in ("adapter", "state"):
        merge(tmp_path / "base", tmp_path / kind, tmp_path / f"{kind}-merged")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_heads_with_other_labels_and_a_base_without_a_head(tmp_path: Path) -> None:
    trained(CASES["roberta"], tmp_path)
    torch.manual_seed(9)
    headless = tf.RobertaModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    headless.config.num_labels = 2
    headless.save_pretrained(tmp_path / "headless")
    merge(tmp_path / "headless", tmp_path / "adapter", tmp_path / "merged")
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_labels == 3
    assert close(answers(merged), reloaded(CASES["roberta"], tmp_path / "base", tmp_path / "adapter"))


LOST = {"distilbert": "pre_classifier.weight", "longlora": "model.layers.1.post_attention_layernorm.weight"}


@pytest.mark.parametrize("name", LOST)
def test_a_saved_module_without_one_of_its_tensors_is_refused(name: str, tmp_path: Path) -> None:
    trained(CASES[name], tmp_path)
    lost = LOST[name]
    edit_weights(
        tmp_path / "adapter" / "adapter_model.safetensors", lambda weights: weights.pop(f"base_model.model.{lost}")
    )
    with pytest.raises(PeanutError, match=f"{lost} should be among the weights.*incomplete"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nested_saved_modules_are_refused(tmp_path: Path) -> None:
    trained(Case(roberta, lambda: peanut(["query"], ["classifier", "out_proj"]), set()), tmp_path)
    with pytest.raises(PeanutError, match="replaces classifier and, inside of it, classifier.out_proj"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_theta_inside_a_saved_module_is_refused(tmp_path: Path) -> None:
    trained(CASES["distilbert"], tmp_path)

    def add_theta(weights: dict[str, torch.Tensor], module: str) -> None:
        for part in ("A", "B"):
            name = f"base_model.model.distilbert.transformer.layer.0.attention.q_lin.peanut_{part}.weight"
            weights[f"base_model.model.{module}.peanut_{part}.weight"] = weights[name].clone()

    for module in ("pre_classifier", "x.modules_to_save.default.y"):
        shutil.copytree(tmp_path / "adapter", tmp_path / module)
        edit_weights(
            tmp_path / module / "adapter_model.safetensors", lambda weights, name=module: add_theta(weights, name)
        )
        with pytest.raises(PeanutError, match=f"adapt {module}, and modules_to_save .* replaces it"):
            load_adapter(tmp_path / module)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("lora", "distilbert"),
        ("lora", "part of a head"),
        ("lora", "batch norms"),
        *(pytest.param("lora", name, marks=pytest.mark.slow) for name in ("longlora", "masked")),
        *(
            pytest.param("peft", name, marks=pytest.mark.slow)
            for name in ("distilbert", "longlora", "part of a head")
        ),
    ],
)
def test_peft_loads_what_is_written_as_an_adapter(kind: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trained(case, tmp_path)
    plan = prepare_merge(tmp_path / "base", [Weighted(load_adapter(tmp_path / "adapter"))])
    if kind == "lora":
        write_lora_adapter(plan_lora_adapter(plan, tmp_path / "out"))
    else:
        write_peft_adapter(plan_peft_adapter(plan, tmp_path / "out"))
    wanted = reloaded(case, tmp_path / "base", tmp_path / "adapter")
    assert close(reloaded(case, tmp_path / "base", tmp_path / "out"), wanted)


def test_a_lost_head_is_missed_and_one_that_the_model_does_not_have_is_not(tmp_path: Path) -> None:
    xlnet = tf.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=96, num_labels=3)
    for name, case in {
        "xlnet": Case(
            lambda: tf.XLNetForSequenceClassification(xlnet), lambda: peanut(["layer_1"], task_type="SEQ_CLS"), set()
        ),
        "bert": Case(bert("SequenceClassification"), lambda: peanut(["query"], task_type="SEQ_CLS"), set()),
    }.items():
        folder = tmp_path / name
        trained(case, folder)
        if name == "xlnet":
            merge(folder / "base", folder / "adapter", folder / "merged")
            merged = type(case.model()).from_pretrained(folder / "merged").eval()
            assert close(answers(merged), reloaded(case, folder / "base", folder / "adapter"))
            continue
        edit_weights(
            folder / "adapter" / "adapter_model.safetensors",
            lambda weights: {key: tensor for key, tensor in weights.items() if "classifier" not in key},
        )
        with pytest.raises(PeanutError, match="classifier.bias and 1 more tensors should be among the weights"):
            merge(folder / "base", folder / "adapter", folder / "merged")


def test_convolutions_that_standardise_their_weight_are_refused(tmp_path: Path) -> None:
    bit = tf.BitConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=4, num_labels=3)
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], modules_to_save=["classifier"])
    trained(Case(lambda: tf.BitForImageClassification(bit), lambda: config, set()), tmp_path)
    with pytest.raises(PeanutError, match="standardises its weight"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
