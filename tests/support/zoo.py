"""Tiny models of many architectures, and their outputs."""

from typing import Any

import torch
import transformers as tf

IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(5))

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LM = {**SIZES, "intermediate_size": 72, "vocab_size": 96, "tie_word_embeddings": False}
ENCODER = {**SIZES, "intermediate_size": 64, "vocab_size": 96, "num_labels": 3}
VISION = {**SIZES, "intermediate_size": 64, "image_size": 16, "patch_size": 4}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


def llava() -> tf.PreTrainedModel:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=tf.LlamaConfig(**{**LM, "num_key_value_heads": 2}),
        image_token_index=95,
        vision_feature_layer=-1,
    )
    return tf.LlavaForConditionalGeneration(config)


def output_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
