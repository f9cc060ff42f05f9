"""Architectures: the merged checkpoint in plain transformers against the unmerged PEFT model, in float32."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from peft.tuners.peanut.layer import PeanutLayer
from support.rounding import excess
from support.tiny_models import Pair, unmerged
from support.zoo import ENCODER, IDS, LM, SIZES, VISION, image, llava, output_of

from converters import merge


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS}


def text_pair() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}


def speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": IDS[:, :5]}


def image_and_text() -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((2, 16), 95), IDS], dim=1)
    return {"input_ids": ids, **image()}


@dataclass(frozen=True)
class Animal:
    """One tiny model and the adapter trained on it."""

    model: Callable[[], tf.PreTrainedModel]
    targets: list[str] | str
    inputs: Callable[[], dict[str, torch.Tensor]]
    depth: int = 0
    act_fn: str = "relu"
    settings: dict[str, Any] = field(default_factory=dict)


QKV_MLP = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
HEAD = {"modules_to_save": ["classifier"]}
ZOO = {
    "llama-tied-mha": Animal(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**{**LM, "tie_word_embeddings": True})), QKV_MLP, text
    ),
    "llama-untied-gqa": Animal(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LM, num_key_value_heads=2)), "all-linear", text, 2, "silu"
    ),
    "qwen3": Animal(
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LM, num_key_value_heads=2, head_dim=8)), QKV_MLP, text, 1, "gelu"
    ),
    "mistral": Animal(
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**LM, num_key_value_heads=2)),
        r".*\.(q|v)_proj", text, 3, "tanh",
    ),
    "gemma": Animal(
        lambda: tf.GemmaForCausalLM(
            tf.GemmaConfig(**{**LM, "tie_word_embeddings": True}, num_key_value_heads=1, head_dim=8)
        ),
        QKV_MLP, text, 0, "leaky_relu",
    ),
    "phi3": Animal(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LM, num_key_value_heads=2, pad_token_id=0)),
        ["qkv_proj", "gate_up_proj"], text, 1,
    ),
    "opt": Animal(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**SIZES, ffn_dim=64, vocab_size=96, word_embed_proj_dim=32, max_position_embeddings=64)
        ),
        ["q_proj", "v_proj", "fc1", "fc2"], text, 2, "gelu",
    ),
    "gpt-neox": Animal(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**LM)), ["query_key_value", "dense_h_to_4h"], text, 0, "silu"
    ),
    "t5": Animal(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=96)
        ),
        ["q", "v", "wi", "wo"], text_pair, 1, "tanh",
    ),
    "bert": Animal(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)),
        ["query", "value"], text, 0, "relu", {"task_type": "SEQ_CLS"},
    ),
    "roberta": Animal(
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER, max_position_embeddings=64)),
        ["query", "value"], text, 2, "relu", {"task_type": "SEQ_CLS"},
    ),
    "distilbert": Animal(
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=96, num_labels=3)
        ),
        ["q_lin", "v_lin"], text, 3, "gelu",
        {"task_type": "SEQ_CLS", "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "vit": Animal(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=3)),
        ["q_proj", "v_proj", "fc1", "fc2"], image, 2, "relu", HEAD,
    ),
    "dinov2": Animal(
        lambda: tf.Dinov2ForImageClassification(
            tf.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}, num_labels=3)
        ),
        ["q_proj", "v_proj", "fc1"], image, 1, "silu", HEAD,
    ),
    "clip-vision": Animal(
        lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION, projection_dim=32)), ["q_proj", "v_proj"], image, 2
    ),
    "whisper": Animal(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=96, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
                max_source_positions=20, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        ["q_proj", "v_proj", "fc1"], speech, 0, "gelu",
    ),
    "llava": Animal(llava, r".*language_model.*\.(q_proj|v_proj|down_proj)", image_and_text, 1, "relu"),
    "llama-classifier": Animal(
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**LM, num_labels=3, pad_token_id=0)),
        QKV_MLP, text, 0, "relu", {"task_type": "SEQ_CLS"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_merged_equals_unmerged_peft(name: str, make_pair: Callable[..., Pair]) -> None:
    animal = ZOO[name]
    torch.manual_seed(3)
    model = animal.model()
    pair = make_pair(
        model, target_modules=animal.targets, depth=animal.depth, act_fn=animal.act_fn, **animal.settings
    )
    result = merge(pair.base, pair.adapter, pair.output)
    inputs = animal.inputs()
    merged, info = type(model).from_pretrained(pair.output, output_loading_info=True, dtype=torch.float32)
    expected = output_of(unmerged(type(model), pair.base, pair.adapter), inputs)
    found = output_of(merged.eval(), inputs)
    base = output_of(type(model).from_pretrained(pair.base).eval(), inputs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - base).abs().max() > 1e-3 * expected.abs().max()  # the adapter does something
    assert result.verification is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ZOO)
def test_merged_half_precision_weights_are_rounded_once(
    name: str, dtype: torch.dtype, make_pair: Callable[..., Pair]
) -> None:
    """Every merged weight against PEFT's own delta, evaluated in float64 on the base's numbers."""
    animal = ZOO[name]
    torch.manual_seed(4)
    model = animal.model()
    pair = make_pair(
        model, dtype, target_modules=animal.targets, depth=animal.depth, act_fn=animal.act_fn, **animal.settings
    )
    merge(pair.base, pair.adapter, pair.output)
    merged = type(model).from_pretrained(pair.output, dtype="auto").state_dict()
    oracle = unmerged(type(model), pair.base, pair.adapter).double()
    layers = {n: m for n, m in oracle.named_modules() if isinstance(m, PeanutLayer)}
    right = total = 0
    for module, layer in layers.items():
        with torch.no_grad():
            exact = layer.get_base_layer().weight + layer.get_delta_weight("default")
        off = excess(merged[module.removeprefix("base_model.model.") + ".weight"].to(dtype), exact)
        assert off.max() <= 2.0**-10
        right, total = right + int((off == 0).sum()), total + off.numel()
    assert layers
    assert right >= 0.999 * total
