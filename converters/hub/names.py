"""Names of models on the Hub."""

import re

# the models of arXiv 2410.01870, §5, and their ids on the Hub
SHORT_NAMES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "roberta-base": "FacebookAI/roberta-base",
    "vit-base": "google/vit-base-patch16-224-in21k",
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id: `model` or `user/model`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name
