"""Keys of libraries that are not read: what they are, why they are not read, and what to do with the adapter."""

import re
from collections.abc import Iterable

_IMAGES = (
    "adapts a generator of images or videos, which is not merged here; merge it with diffusers (load_lora_weights, "
    "then fuse_lora)"
)
_ROTARY = "the rows of q and k in the order of Meta's rotary embedding, which the numbers of heads are needed to undo"

# what matches a key -> what its adapter is, and what to do. Keys come from files of any origin: no pattern has two
# parts that could share a text in many ways, so that a long key takes no longer than its length
_KEYS = {
    r"(decoder\.)?(layers\.\d+\.|output\.).*(lora_[ab]\.weight|magnitude)": (
        f"is in torchtune's own names, with {_ROTARY}; torchtune's FullModelHFCheckpointer writes the same adapter "
        "as adapter_model.safetensors: give the folder of that"
    ),
    r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.lora_[AB]\.weight": (
        f"is in the names of Mistral's own code (mistral-finetune), with {_ROTARY}; merge it there "
        "(utils.merge_lora), and convert the result to transformers' form"
    ),
    r"lora_(unet|te\d*|transformer|prior[^\W_]*)_[^.]+\..+": f"has keys of kohya's scripts, and {_IMAGES}",
    r"lycoris_[^.]+\..+": (
        "has keys of LyCORIS, which joins the names of modules by underscores, so that `up_proj` and `up.proj` are "
        "the same; load it with LyCORIS on its base (create_lycoris_from_weights), merge it there (merge_to), and "
        "save the model"
    ),
    r"(unet|text_encoder(_\d+)?\.text_model|diffusion_model)\..+|transformer\.(single_)?transformer_blocks\..+"
    r"|.(?:(?!\.processor\.).)*\.processor\..*lora.+|.+\.lora_linear_layer\.(up|down)\.weight": (
        f"has keys of diffusers or ComfyUI, and {_IMAGES}"
    ),
    r".+\.adapter_layer\.\w*adapter\.linear_(in|out)\.weight|.+\.adapter\.linear_(in|out)\.weight\d*": (
        "is in the names of NVIDIA's NeMo or Megatron, whose layers join q, k and v in an order of their own; merge "
        "it there, or export it from there to Hugging Face PEFT's form"
    ),
    r".+\.(adapters|loras)\.[^.]+\.(adapter_(down|up)|lora_[AB]).*": (
        "has keys of AdapterHub's `adapters`, and its adapter_config.json is not beside them; load it with that "
        "library, whose merge_adapter merges what is LoRA"
    ),
    r"(.+\.)?(rotate_layer|learned_source)\..+": (
        "is ReFT (pyreft): it edits the hidden states of some tokens, so it cannot be merged; serve it with pyreft"
    ),
    r"(.+\.)?prefix_encoder\..+": (
        "learns prompts (P-Tuning v2), which are not part of any weight, so it cannot be merged; serve it with the "
        "code that trained it"
    ),
}

# what only matches where no layout claims the keys: HF PEFT has these names for some of its methods
_UNCLAIMED_KEYS = {
    r"transformer\.h\.\d+\.(attn\.(attn|qkv|proj)|mlp\.(fc|fc_[12]|proj))\.lora_[AB]": (
        "is in LitGPT's names, which joins q, k and v; merge it there (`litgpt merge_lora`), and convert the result "
        "(`litgpt convert_from_litgpt`)"
    ),
    r".+\.lora_[AB]": (
        "is LoRA as loralib or OpenDelta save it, without its scale; if lora_A is (r, in) and lora_B (out, r), "
        "rename each key to `base_model.model.<module>.lora_A.weight`, and write an adapter_config.json with "
        "peft_type LORA, r, lora_alpha and target_modules"
    ),
    r".+\.(lora_down|lora_up)\.weight": (
        "names its factors lora_down and lora_up, as tools for image generators do; if they belong to a language "
        "model, rename each key to PEFT's `base_model.model.<module>.lora_A.weight` (down) and `lora_B.weight` (up), "
        "and write an adapter_config.json with peft_type LORA, r, lora_alpha and target_modules"
    ),
}


def explain_keys(keys: Iterable[str], unclaimed: bool = False) -> str | None:
    """What an adapter with a key that belongs to a library that is not read is, and what to do; None if none does.

    Args:
        keys: of its weights.
        unclaimed: they are in no layout that is read.
    """
    patterns = _UNCLAIMED_KEYS if unclaimed else _KEYS
    for key in keys:
        for pattern, reason in patterns.items():
            if re.fullmatch(pattern, key, re.DOTALL):
                return f"{reason} (its keys: {key}, ...)"
    return None
