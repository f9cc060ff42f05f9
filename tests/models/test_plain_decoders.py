"""The table of plain decoders against transformers' own classes, and the bases that it leaves to them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from support.sweep.small_configs import small_config

from converters.files.header import TensorInfo
from converters.models import plain_decoders
from converters.models.architecture import Architecture, build_architecture
from converters.models.checkpoint import Checkpoint
from converters.models.plain_decoders import DECODERS, plain_decoder

SAME = ("name", "shapes", "linear", "tied", "prefix", "num_labels", "vocab_size", "transposed")
SAME += ("embeddings", "obstacles")
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
BIASES = {"attention_bias": True, "mlp_bias": True}


def config_of(model_type: str, **settings: Any) -> dict[str, Any]:
    """A small config as it stands in a file, with other heads for keys, and heads of a size of their own."""
    config = small_config(model_type, head_dim=12, **settings)
    written = json.loads(config.to_json_string(use_diff=False))
    return {**written, "architectures": [DECODERS[model_type].name]}


def base_of(config: Mapping[str, Any], *extra: str, without: str | None = None) -> Checkpoint:
    """A base with the tensors that transformers saves for a config; only their shapes count."""
    arch = build_architecture(config, config["architectures"][0])
    shapes = {name: shape for name, shape in arch.shapes.items() if name not in arch.tied and name != without}
    shapes |= dict.fromkeys(extra, (16,))
    tensors = {name: TensorInfo(name, "F32", shape, Path("none"), 0, 4) for name, shape in shapes.items()}
    return Checkpoint(Path("none"), dict(config), tensors, ("none",))


def compare(found: Architecture | None, wanted: Architecture) -> None:
    assert found is not None
    assert {name: getattr(found, name) for name in SAME} == {name: getattr(wanted, name) for name in SAME}
    for name in (*wanted.shapes, *(f"{module}.bias" for module in wanted.linear), BUFFER):
        assert (found.canonical(name), found.converted(name)) == (wanted.canonical(name), wanted.converted(name))
        assert found.conversion(name) is None and found.optional(name) == wanted.optional(name)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("tied", [True, False, None])
def test_the_table_says_what_transformers_says(
    model_type: str, tied: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the config does not state the tie, the size of heads or the biases, and where it has biases."""
    given = config_of(model_type)
    given |= {} if tied is None else {"tie_word_embeddings": tied}
    left_out = ("attention_bias", "mlp_bias", *(["tie_word_embeddings"] if tied is None else []))
    plain = {key: value for key, value in given.items() if key not in left_out}
    short = {key: value for key, value in plain.items() if key != "head_dim"}
    for config in (given, plain, {**given, **BIASES}, {**given, "mlp_bias": True}, short):
        base, wanted = base_of(config, BUFFER), build_architecture(config, config["architectures"][0])
        with monkeypatch.context() as without_code:
            without_code.setattr(plain_decoders, "build_architecture", None)
            found = plain_decoder(base, base.config, base.architecture)
            if config is short and not DECODERS[model_type].head_dim_follows:
                assert found is None
            else:
                compare(found, wanted)


def test_a_tied_head_may_be_stored() -> None:
    config = config_of("qwen2", tie_word_embeddings=True)
    base = base_of(config)
    embedding = base.tensors["model.embed_tokens.weight"]
    stored = {**base.tensors, "lm_head.weight": replace(embedding, name="lm_head.weight")}
    assert "lm_head.weight" not in base.tensors
    wanted = build_architecture(config, base.architecture)
    compare(plain_decoder(replace(base, tensors=stored), config, base.architecture), wanted)


def test_a_merged_config_is_answered_too() -> None:
    """With another vocabulary, or untied, on the same base."""
    base = base_of(config_of("gemma2"))
    merged = {**base.config, "vocab_size": 130, "tie_word_embeddings": False}
    compare(plain_decoder(base, merged, base.architecture), build_architecture(merged, base.architecture))


def test_a_name_that_it_does_not_have_is_left_to_transformers() -> None:
    config = config_of("llama")
    base = base_of(config)
    found = plain_decoder(base, base.config, base.architecture)
    assert found is not None
    assert found.canonical("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert found.canonical("encoder.LayerNorm.gamma") == "encoder.LayerNorm.weight"
    assert not found.converted("layers.0.mlp.up_proj.weight")


def refused(config: Mapping[str, Any], base: Checkpoint | None = None, class_name: str | None = "same") -> bool:
    base = replace(base or base_of(config), config=dict(config))
    return plain_decoder(base, base.config, base.architecture if class_name == "same" else class_name) is None


def test_what_is_unusual_is_left_to_transformers() -> None:
    config = config_of("llama")
    base = base_of(config)
    assert not refused(config, base)
    assert refused(config, base, "LlamaForSequenceClassification")
    assert refused(config, base, None)
    changes: list[dict[str, Any]] = [
        {"model_type": "llama4_text"},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
        {"num_key_value_heads": None},
        {"num_attention_heads": 5},
        {"head_dim": None},
        {"head_dim": 8},  # other shapes than the base's
        {"hidden_size": "32"},
        {"vocab_size": 100},
        {"tie_word_embeddings": "yes"},
        {"attention_bias": True},
        {"num_hidden_layers": 3},
    ]
    for change in changes:
        assert refused({**config, **change}, base), change
    assert refused({key: value for key, value in config.items() if key != "num_key_value_heads"}, base)
    assert refused(config, base_of(config, without="model.layers.1.mlp.up_proj.weight"))
    assert refused(config, base_of(config, without="lm_head.weight"))
    assert refused(config, base_of(config, without="model.embed_tokens.weight"))


def test_every_row_is_a_class_of_transformers() -> None:
    assert all(name in tf.CONFIG_MAPPING and hasattr(tf, row.name) for name, row in DECODERS.items())
