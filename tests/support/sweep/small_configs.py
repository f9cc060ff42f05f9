"""A small config of any model type of transformers: its defaults, with every size made small by its name."""

import re
from typing import Any

import transformers as tf

# name of a field -> its value; the first that matches counts
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|.*num_embeddings", 128),
    (r".*(kv|key_value|query_groups|kv_heads|num_key_value)_?heads?.*|.*_kv_heads|num_query_groups|.*num_kv.*", 2),
    (r".*(num|n)_?.*heads.*|n_head|.*attention_heads.*|num_heads.*|.*_heads", 4),
    (r".*(head_dim|d_kv|head_size|d_head|kv_channels|attention_head_size|qk_nope_head_dim|v_head_dim)", 8),
    (r"rotary_dim", 4),
    (r".*lora_rank", 16),
    (r".*(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_blocks|num_.*_layers)", 2),
    (r".*(moe_)?(shared_expert_)?(intermediate_size|ffn_dim|d_ff|n_inner|hidden_dim|dim_ff|ffn_hidden_size)", 48),
    (r".*(num|n)_.*group.*|topk_group", 1),
    (r".*(top_k|per_tok|topk|num_selected).*", 2),
    (r".*(num|n)_.*expert.*|.*num_local_experts", 4),
    (r".*first_k_dense_replace|.*decoder_sparse_step|moe_layer_start_index", 1),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|^dim|_dim|width|projection_size|rnn_size)", 32),
    (r".*(max_position_embeddings|n_positions|max_.*positions|n_ctx|max_sequence_length|max_seq_len.*)", 64),
    (r".*sliding_window|.*window_size|.*block_size|.*chunk_size", 8),
    (r".*image_size", 32),
    (r".*patch_size", 8),
)
_SAME = ("num_channels", "in_channels", "num_labels")  # and neither tokens nor what is below
_STEPS = {"hidden_sizes", "embed_dims", "embed_dim", "out_channels", "neck_hidden_sizes", "dims", "widths"}
# fields that depend on each other in a type of model, and are not small by their names
_OF_TYPE: dict[str, dict[str, Any]] = {
    "donut-swin": {"image_size": 128, "window_size": 4},
    "efficientnet": {"out_channels": [16, 24, 40, 80, 112, 192, 320], "width_coefficient": 0.5, "hidden_dim": 640},
    "hgnet_v2": {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048]},
    "levit": {"image_size": 64, "patch_size": 16, "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]},
    "mobilevitv2": {"image_size": 64},
    "swin": {"image_size": 128, "window_size": 4},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
}
MOST = 25_000_000  # parameters


def small_config(model_type: str, layers: int = 2, **settings: Any) -> Any:
    """A small config. Raises whatever transformers does for one that cannot be made this way."""
    config_class = tf.CONFIG_MAPPING[model_type]
    changes = _changes(config_class().to_dict())
    if "num_hidden_layers" in changes:
        changes["num_hidden_layers"] = layers
    for name in ("text_config", "vision_config", "audio_config"):
        if isinstance(changes.get(name), dict):
            changes[name].pop("model_type", None)
    return config_class(**{**changes, **_OF_TYPE.get(model_type, {}), **settings})


def _changes(fields: dict[str, Any]) -> dict[str, Any]:
    """What is small of the fields of a config, whose other values are the defaults."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config") and "model_type" in value:
            found[name] = {**_changes(value), "model_type": value["model_type"]}
        elif name.endswith("_token_id") and isinstance(value, int) and value > 2:
            found[name] = 2
        elif name in _STEPS and isinstance(value, list):
            found[name] = [16 * (step + 1) for step in range(len(value))]
        elif name in ("num_heads", "num_attention_heads") and isinstance(value, list):
            found[name] = [2**step for step in range(len(value))]
        elif name == "depths" and isinstance(value, list):
            found[name] = [1] * len(value)
        elif type(value) is int and value > 1 and name not in _SAME:
            small = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if small is not None and small < value:
                found[name] = small
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
        found.pop("qk_head_dim", None)
        found.pop("head_dim", None)
    elif "head_dim" in fields and fields["head_dim"] is None:
        found["head_dim"] = 8
    return found
