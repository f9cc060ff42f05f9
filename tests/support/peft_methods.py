"""Adapters of any PEFT method on tiny models, trained-looking, saved as PEFT saves them; PEFT's forward as oracle."""

from pathlib import Path

import torch
import transformers as tf
from peft import PeftConfig, PeftModel, get_peft_model
from support.tiny_models import tiny_llama

IDS = torch.arange(2, 26).view(2, 12)


def tiny_gpt2() -> tf.GPT2LMHeadModel:
    """Its linear layers are Conv1D, with biases."""
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32)
    return tf.GPT2LMHeadModel(config)


def tiny_bert_classifier() -> tf.BertForSequenceClassification:
    """Linear layers with biases, and a head."""
    config = tf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=96,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config)


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert_classifier}


def train(model: tf.PreTrainedModel, config: PeftConfig, base: Path, adapter: Path, seed: int = 1) -> PeftModel:
    """Save a model and an adapter for it; every trained number and every bias of the base is changed at random."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(base)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(adapter)
    return adapted.eval()


def reloaded(model: tf.PreTrainedModel, base: Path, adapter: Path) -> PeftModel:
    """The oracle: PEFT's unmerged model, from what was saved."""
    fresh = type(model).from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(fresh, adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Float32 logits within 1e-4 of the largest."""
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())
