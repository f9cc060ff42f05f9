"""Different names for the same weights: spellings of one repository, and copies and quantizations of a model.

Adapters record the name that their training was given. QLoRA trainings record a quantized copy, and nothing can be
merged into that: what is needed is the model that it was made from.
"""

import re

from converters.hub.names import SHORT_NAMES

# owners of models that had none before: `roberta-base` is `FacebookAI/roberta-base`
_FIRST_OWNERS = {"albert", "almanach", "distilbert", "facebookai", "google-bert", "google-t5", "openai-community"}
_OLD_NAMES = {new.rsplit("/", 1)[-1].lower(): new.lower() for new in SHORT_NAMES.values()}

# accounts that publish other people's models, unchanged or quantized, under the models' own names
_COPYISTS = {"casperhansen", "hugging-quants", "mlx-community", "modelcloud", "neuralmagic", "nousresearch"}
_COPYISTS |= {"redhatai", "solidrust", "thebloke", "unsloth"}

# how repositories of quantized models are named: Llama-3.2-1B-4bit, llama-3-8b-bnb-4bit, gpt-oss-20b-MXFP4-Q8
_FORMAT = r"\d+[-_]?bit|bnb|awq|gptq|int[48]|fp[48]|mxfp[48]|nvfp4|nf4|q[2-8]|quantized\.w\d+a\d+|w\d+a\d+"
_QUANTIZED = re.compile(rf"[-_]({_FORMAT})(?![a-z0-9])", re.IGNORECASE)
_QUANTIZED_END = re.compile(rf"([-_](unsloth|dynamic|\d+g|{_FORMAT}))+$", re.IGNORECASE)
_CACHED = re.compile(r"(?:^|/)models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?")
_CAST_END = re.compile(r"[-_](bf16|fp16|fp32)$", re.IGNORECASE)


def cached_repository(path: str) -> tuple[str, str] | None:
    """The repository and the commit, if `path` is a folder of huggingface-hub's cache."""
    found = _CACHED.search(path)
    return (f"{found[1]}/{found[2]}", found[3]) if found is not None else None


def repository(name: str) -> str:
    """One spelling for all names that the Hub resolves to the same repository."""
    name = SHORT_NAMES.get(name, name).lower()
    name = _OLD_NAMES.get(name, name)
    owner, _, rest = name.rpartition("/")
    return rest if owner in _FIRST_OWNERS else name


def is_quantized(name: str) -> bool:
    """Whether a repository has quantized weights, by its name."""
    return _QUANTIZED.search(name) is not None


def unquantized(name: str) -> str:
    """The name without what says that its weights are quantized: `unsloth/X-bnb-4bit` -> `unsloth/X`."""
    stripped = _QUANTIZED_END.sub("", name)
    return stripped if is_quantized(name) else name


def are_twins(first: str, second: str) -> bool:
    """Whether two repositories hold copies or quantizations of one model, by the names that those are given.

    The rest of the names is the same, and the owners do not speak against it: they are the same, one of them
    publishes other people's models, or one name says that it is a quantization of the other.
    """
    if _model(first) != _model(second):
        return False
    owners = {repository(name).rpartition("/")[0] for name in (first, second)}
    return len(owners) == 1 or bool(owners & _COPYISTS) or is_quantized(first) != is_quantized(second)


def _model(name: str) -> str:
    """What copies of a model have in common: `unsloth/llama-3-8b-bnb-4bit` and `meta-llama/Meta-Llama-3-8B`."""
    model = _CAST_END.sub("", unquantized(repository(name))).rpartition("/")[2]
    return model.removeprefix("meta-").removesuffix("-hf")
