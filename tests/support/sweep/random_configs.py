"""Random configs of every method of HF PEFT that is merged: settings, and the modules that are adapted or saved."""

import dataclasses
from random import Random

from peft import PeftConfig
from support.sweep.random_settings import DRAWS, NAMES, Settings

# model -> leaves of its linear layers, of which some are targeted
LEAVES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "pooler.dense"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
}
# model -> the list of its layers, and what of it may be trained whole
_LISTS = {"llama": "layers", "qwen2": "layers", "gpt2": "h", "bert": "layer", "vit": "layers"}
_WHOLE = {
    "llama": ["lm_head", "embed_tokens", "model.norm"],
    "qwen2": ["embed_tokens", "post_attention_layernorm"],
    "gpt2": ["ln_f", "wpe"],
    "bert": ["classifier", "LayerNorm"],
    "vit": ["classifier", "vit.layernorm"],
}
# model -> its embedding; and what else PEFT adapts by LoRA
_EMBEDDINGS = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}
_OTHERS = {"llama": "lm_head", "qwen2": "lm_head", "gpt2": "lm_head", "bert": "dense", "vit": "projection"}
_NORMS = {"gpt2": "ln_1", "bert": "LayerNorm", "vit": "layernorm_before"}  # or `input_layernorm`
_TASKS = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None}
_CONV1D = {  # types whose layers take GPT-2's
    "ADALORA", "DEFT", "FOURIERFT", "FROD", "GRALORA", "HIRA", "IA3", "LORA", "PVERA", "RANDLORA", "TINYLORA",
    "UNILORA", "VBLORA", "VERA", "WAVEFT", "LN_TUNING", "TRAINABLE_TOKENS",
}  # fmt: skip


# field of a config -> what it may say of some modules
_PATTERNS = {
    "rank_pattern": [2, 6],
    "alpha_pattern": [3, 10],
    "lambda_pattern": [3, 10],
    "n_frequency_pattern": [31, 40],
    "block_size_pattern": [2],
}


def draw(rng: Random, config_class: type[PeftConfig]) -> tuple[str, PeftConfig]:
    """A model that the method is for, and a config. Raises what PEFT raises for settings that it does not take."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    peft_type = NAMES[config_class]
    settings = DRAWS[config_class](rng)
    models = [model for model in LEAVES if model != "gpt2" or peft_type in _CONV1D]
    models = [
        model
        for model in models
        if model != "vit" or not {"token_indices", "trainable_token_indices"} & settings.keys()
    ]
    model = (
        "llama"
        if "layer_replication" in settings
        else rng.choice(["qwen2", "bert"] if peft_type == "BEFT" else models)
    )
    given = {**settings, "task_type": _TASKS[model], **_places(rng, peft_type, model, fields)}
    for field in [name for name in settings if name in _PATTERNS]:
        if rng.random() < 0.5:
            given[field] = {name: rng.choice(_PATTERNS[field]) for name in _some_modules(rng, model)}
    if "fan_in_fan_out" in fields and model == "gpt2":
        given["fan_in_fan_out"] = True
    if "bias" in fields and rng.random() < 0.3:
        given["bias"] = rng.choice(["all", f"{peft_type.lower()}_only"])
    if isinstance(tokens := given.get("trainable_token_indices"), list) and rng.random() < 0.5:
        given["trainable_token_indices"] = {_EMBEDDINGS[model]: tokens}
    if "modules_to_save" in fields and (model == "vit" or rng.random() < 0.3):
        given["modules_to_save"] = [rng.choice(_WHOLE[model])]
    return model, config_class(**given)


def _some_modules(rng: Random, model: str) -> list[str]:
    """One or two patterns, as PEFT matches them with the ends of names: the first that matches counts."""
    leaf = rng.choice(LEAVES[model]).replace(".", r"\.")
    of_layer = rf"{_LISTS[model]}\.{rng.randint(0, 1)}\..*"
    forms = [leaf, rf".*\.{leaf}", of_layer, of_layer + leaf, rf"^.*\.1\..*{leaf}", rf"({leaf}|nothing)"]
    return rng.sample(forms, rng.randint(1, 2))


def _places(rng: Random, peft_type: str, model: str, fields: set[str]) -> Settings:
    """Which modules are adapted."""
    if peft_type == "LN_TUNING":
        return {"target_modules": [_NORMS.get(model, "input_layernorm")]}
    if peft_type == "TRAINABLE_TOKENS":
        return {"target_modules": [_EMBEDDINGS[model]]}
    some = sorted(rng.sample(LEAVES[model], rng.randint(1, 3)))
    if peft_type == "LORA" and rng.random() < 0.2:
        some.append(rng.choice([_OTHERS[model], _EMBEDDINGS.get(model, "projection")]))
    how = rng.choice(["list", "list", "layers", "pattern", "all-linear"])
    if how == "pattern" or "layers_to_transform" not in fields:
        ends = "|".join(name.replace(".", r"\.") for name in some)
        found: Settings = {"target_modules": rf".*\.[01]\..*({ends})"}
    elif how == "all-linear":
        found = {"target_modules": "all-linear"}
    else:
        found = {"target_modules": some}
    if peft_type == "IA3":
        found = {"target_modules": some, "feedforward_modules": rng.sample(some, rng.randint(0, len(some)))}
    if how == "layers" and "layers_to_transform" in fields:
        found["layers_to_transform"] = rng.choice([0, 1, [0], [0, 1]])
        if rng.random() < 0.5:
            found["layers_pattern"] = _LISTS[model]
    if "exclude_modules" in fields and rng.random() < 0.25:
        left_out = rng.choice(LEAVES[model])
        found["exclude_modules"] = rng.choice([[left_out], rf".*\.0\..*{left_out}"])
    return found
