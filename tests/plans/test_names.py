"""Names, prefixes and heads: adapters and checkpoints of old and new transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support.paths import DATA
from support.tiny_models import Pair, save_adapter, tiny_llama
from support.zoo import ENCODER, IDS, VISION, image, llava, output_of

from converters import load_adapter, merge, open_checkpoint, prepare_merge
from converters.errors import AdapterConfigError, BaseMismatchError, OptionError, TargetError, ThetaError

OLD_VIT = (
    ("vit.layers.", "vit.encoder.layer."),
    (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"),
    (".attention.v_proj", ".attention.attention.value"),
    (".attention.o_proj", ".attention.output.dense"),
    (".mlp.fc1", ".intermediate.dense"),
    (".mlp.fc2", ".output.dense"),
)


def rename_weights(file: Path, pairs: tuple[tuple[str, str], ...]) -> None:
    weights = load_file(file)
    renamed = {}
    for name, tensor in weights.items():
        for new, old in pairs:
            name = name.replace(new, old)
        renamed[name] = tensor
    save_file(renamed, file, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def vit_with_head(base: Path, adapter: Path, num_labels: int = 3) -> tf.PreTrainedModel:
    """A headless ViT base as on the Hub, and an adapter trained on it with a head. Returns the trained class."""
    torch.manual_seed(0)
    tf.ViTModel(tf.ViTConfig(**VISION)).save_pretrained(base)
    model = tf.ViTForImageClassification.from_pretrained(base, num_labels=num_labels)
    save_adapter(model, adapter, target_modules=["q_proj", "v_proj", "fc1"], modules_to_save=["classifier"])
    return model


def vit_logits(base: Path, adapter: Path, num_labels: int = 3) -> torch.Tensor:
    from peft import PeftModel

    model = tf.ViTForImageClassification.from_pretrained(base, num_labels=num_labels)
    return output_of(PeftModel.from_pretrained(model, adapter).eval(), image())


@pytest.mark.parametrize("adapter_names", ["new", "old"])
@pytest.mark.parametrize("base_names", ["new", "old"])
@pytest.mark.parametrize("prefix", ["headless", "with prefix"])
def test_old_and_new_names_pair_up(tmp_path: Path, base_names: str, adapter_names: str, prefix: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    vit_with_head(base, adapter)
    expected = vit_logits(base, adapter)
    weights = load_file(base / "model.safetensors")
    assert any(name.startswith("encoder.layer.") for name in weights)  # what transformers 5 still writes
    if prefix == "with prefix":
        weights = {f"vit.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    if base_names == "new":
        new = [(old.removeprefix("vit."), new.removeprefix("vit.")) for new, old in OLD_VIT]
        rename_weights(base / "model.safetensors", tuple(new))
    if adapter_names == "old":
        rename_weights(adapter / "adapter_model.safetensors", OLD_VIT)
        modules = ["query", "value", "intermediate.dense"]
        edit_json(adapter / "adapter_config.json", target_modules=modules)
    result = merge(base, adapter, tmp_path / "merged")
    merged, info = tf.ViTForImageClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    found = output_of(merged.eval(), image())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # a headless base had a pooler, which the merged class has not; every name carries the prefix old loaders want
    assert set(result.plan.dropped) == {n for n in weights if "pooler" in n}
    assert all(t.name.startswith(("vit.", "classifier.")) for t in result.plan.tensors)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("base_class", ["Model", "ForMaskedLM"])
def test_text_base_without_the_head(tmp_path: Path, family: str, base_class: str) -> None:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**ENCODER, "num_labels": 2}, max_position_embeddings=64)
    getattr(tf, f"{family}{base_class}")(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    inner = "" if base_class == "Model" else f"{family.lower()}."
    weights[f"{inner}embeddings.position_ids"] = torch.arange(64)[None]  # as checkpoints before transformers 4.31
    pooler = {n: weights.setdefault(n, torch.randn(*s) / 8) for n, s in {
        f"{inner}pooler.dense.weight": (32, 32), f"{inner}pooler.dense.bias": (32,)}.items()}  # fmt: skip
    save_file(weights, file, metadata={"format": "pt"})
    head = getattr(tf, f"{family}ForSequenceClassification")
    model = head.from_pretrained(tmp_path / "base", num_labels=5)
    save_adapter(model, tmp_path / "adapter", target_modules=["query", "value"], task_type="SEQ_CLS")
    from peft import PeftModel

    fresh = head.from_pretrained(tmp_path / "base", num_labels=5)
    expected = output_of(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), {"input_ids": IDS})
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", labels=list("abcde"))
    merged, info = head.from_pretrained(tmp_path / "merged", output_loading_info=True)
    found = output_of(merged.eval(), {"input_ids": IDS})
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert merged.config.id2label == dict(enumerate("abcde"))
    assert f"{inner}embeddings.position_ids" in result.plan.dropped
    assert set(pooler) <= set(result.plan.dropped) or family == "Bert"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("task", "end"), [("SEQ_CLS", "SequenceClassification"), ("TOKEN_CLS", "TokenClassification")]
)
def test_a_language_model_becomes_a_classifier(tmp_path: Path, tied: bool, task: str, end: str) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model_class = getattr(tf, f"LlamaFor{end}")
    model = model_class.from_pretrained(tmp_path / "base", num_labels=4, pad_token_id=0)
    save_adapter(model, tmp_path / "adapter", task_type=task)
    fresh = model_class.from_pretrained(tmp_path / "base", num_labels=4, pad_token_id=0)
    expected = output_of(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), {"input_ids": IDS})
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, info = model_class.from_pretrained(tmp_path / "merged", output_loading_info=True, pad_token_id=0)
    assert (output_of(merged.eval(), {"input_ids": IDS}) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert set(result.plan.dropped) == (set() if tied else {"lm_head.weight"})
    assert merged.config.num_labels == 4


@pytest.mark.parametrize("names", ["new", "old"])
def test_wrapped_multimodal_language_model(tmp_path: Path, names: str) -> None:
    torch.manual_seed(0)
    model = llava()
    model.save_pretrained(tmp_path / "base")
    targets = r".*language_model.*\.(q_proj|v_proj)"
    save_adapter(model, tmp_path / "adapter", target_modules=targets)
    if names == "old":  # transformers before 4.52 called the language model this
        old = (("base_model.model.model.language_model.", "base_model.model.language_model.model."),)
        rename_weights(tmp_path / "adapter" / "adapter_model.safetensors", old)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 4
    assert all("language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)


def test_a_head_of_the_bases_size_keeps_its_labels_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = {0: "cat", 1: "dog", 2: "cow"}
    model = tf.ViTForImageClassification(
        tf.ViTConfig(**VISION, id2label=labels, label2id={v: k for k, v in labels.items()})
    )
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", modules_to_save=["classifier"])
    plan = prepare_merge(tmp_path / "base", tmp_path / "adapter")
    assert plan.config["id2label"] == {"0": "cat", "1": "dog", "2": "cow"}
    assert any("labels are the base's (cat, dog, cow" in note for note in plan.notes)
    given = prepare_merge(tmp_path / "base", tmp_path / "adapter", labels=["x", "y", "z"])
    assert given.config["label2id"] == {"x": 0, "y": 1, "z": 2}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({"id2label": {"0": "p", "1": "q", "2": "r"}}))
    assert prepare_merge(tmp_path / "base", tmp_path / "adapter").config["id2label"]["2"] == "r"
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({"id2label": {"cat": 0, "dog": 1}}))
    assert prepare_merge(tmp_path / "base", tmp_path / "adapter").config["id2label"]["2"] == "cow"
    (tmp_path / "adapter" / "config.json").write_text("{")
    with pytest.raises(AdapterConfigError, match="cannot read the model config"):
        prepare_merge(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").unlink()
    with pytest.raises(OptionError, match="2 labels were given, the adapter's head has 3 outputs"):
        prepare_merge(tmp_path / "base", tmp_path / "adapter", labels=["x", "y"])


def test_labels_without_a_head_are_refused(pair: Pair) -> None:
    with pytest.raises(OptionError, match="no classification head"):
        prepare_merge(pair.base, pair.adapter, labels=["x", "y"])


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tf.ViTModel(tf.ViTConfig(**VISION)).save_pretrained(tmp_path / "base")
    other = tf.ViTForImageClassification(tf.ViTConfig(**{**VISION, "intermediate_size": 80}, num_labels=3))
    save_adapter(other, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["classifier"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.classifier.weight"] = torch.zeros(3, 40)
    save_file(weights, file)
    with pytest.raises(
        BaseMismatchError, match=r"classifier.weight has shape \(3, 40\) in the adapter, ViTForImageCl"
    ):
        prepare_merge(tmp_path / "base", tmp_path / "adapter")


def test_a_base_that_transformers_cannot_build(tmp_path: Path) -> None:
    vit_with_head(tmp_path / "base", tmp_path / "adapter")
    edit_json(tmp_path / "base" / "config.json", hidden_size="wide")
    with pytest.raises(TargetError, match="cannot build ViTForImageClassification from the base's config"):
        prepare_merge(tmp_path / "base", tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(TargetError, match="is for the model type 'vit', the base has 'llama'; is this the base"):
        prepare_merge(tmp_path / "llama", DATA / "vit-tiny" / "oddeven")
    edit_json(tmp_path / "base" / "config.json", model_type="my_model", auto_map={"AutoModel": "m.Model"})
    with pytest.raises(TargetError, match="does not know the model type 'my_model' .* remote code are not run"):
        prepare_merge(tmp_path / "base", tmp_path / "adapter")


def test_an_unknown_module_shows_the_nearest_names(pair: Pair) -> None:
    rename_weights(pair.adapter / "adapter_model.safetensors", ((".self_attn.", ".self_atn."),))
    with pytest.raises(
        TargetError, match=r"self_atn.q_proj.weight has no matching tensor.*layers.0.self_attn.q_proj"
    ):
        prepare_merge(pair.base, pair.adapter)


def test_a_base_with_more_layers_than_the_adapter_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    save_adapter(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ThetaError, match=r"model.layers.2.self_attn.q_proj and 1 more should have θ like the rest"):
        prepare_merge(tmp_path / "base", tmp_path / "adapter")


def test_a_layer_that_only_the_checkpoint_has_needs_no_theta(pair: Pair) -> None:
    """Checkpoints with extra prediction layers name them as the next layer; the trained class has none of it."""
    file = pair.base / "model.safetensors"
    weights = load_file(file)
    extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in weights.items() if "layers.1." in n}
    save_file({**weights, **extra}, file, metadata={"format": "pt"})
    merge(pair.base, pair.adapter, pair.output)
    assert set(load_file(pair.output / "model.safetensors")) == {*weights, *extra}


@pytest.mark.parametrize("settings", [
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": r".*\.1\..*q_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"exclude_modules": r".*layers\.0.*"},
])  # fmt: skip
def test_targeting_of_the_config_agrees_with_what_peft_adapts(make_pair: Callable[..., Pair], settings: dict) -> None:
    pair = make_pair(**settings)
    adapter, base = load_adapter(pair.adapter), open_checkpoint(pair.base)
    linear = {n.removesuffix(".weight") for n, t in base.tensors.items() if len(t.shape) == 2 and "layers" in n}
    assert {name for name in linear if adapter.targeting.matches(name)} == set(adapter.modules)
    updated = {term.module for t in prepare_merge(pair.base, pair.adapter).tensors for term in t.terms}
    assert updated == set(adapter.modules)
