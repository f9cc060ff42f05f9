"""Models of sentence-transformers: what comes before and after a model without a head."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, ConversionError
from converters.files.json_files import parse_json, read_json

MODULES = "modules.json"

# names of settings -> pooling, in the order in which several are joined
_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_OTHERS = ("word_embedding_dimension", "embedding_dimension", "include_prompt", "pooling_mode")


@dataclass(frozen=True)
class Sentences:
    """How texts become embeddings.

    Attributes:
        pooling: one or several of `cls`, `max`, `mean`, `mean_sqrt_len_tokens`, `weightedmean` and `lasttoken`,
            joined in this order.
        normalizes: whether embeddings have length 1.
        max_length: number of tokens, where it is less than the model's.
        prompt: the text before every text.
        lowercase: whether texts are lowercased first.
    """

    pooling: tuple[str, ...]
    normalizes: bool = False
    max_length: int | None = None
    prompt: str = ""
    lowercase: bool = False


def read_sentences(folder: Path) -> Sentences | None:
    """What the files of sentence-transformers in a model's folder say; None if there are none.

    Raises:
        ConversionError: a module is neither pooling nor normalisation.
        CheckpointError: a file is damaged.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = _modules(folder / MODULES)
    pooling: tuple[str, ...] = ()
    kinds, prompts = [], _optional(folder / "config_sentence_transformers.json")
    prompt = str((prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")) or "")
    for module in modules:
        kinds.append(str(module.get("type")).rsplit(".", 1)[-1])
        if kinds[-1] == "Pooling":
            pooling = _read_pooling(folder / str(module.get("path")) / "config.json", prompt)
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        raise ConversionError(
            f"{folder / MODULES}: its modules are {', '.join(kinds)}; only a Transformer in the folder itself with "
            "Pooling, and Normalize after it, can be exported to ONNX"
        )
    settings = _optional(folder / "sentence_bert_config.json")
    return Sentences(
        pooling, "Normalize" in kinds, settings.get("max_seq_length"), prompt, settings.get("do_lower_case") is True
    )


def _modules(file: Path) -> list[dict[str, Any]]:
    try:
        found = parse_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot read the modules ({error})") from None
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise CheckpointError(f"{file}: expected a list of objects")
    return found


def _read_pooling(file: Path, prompt: str) -> tuple[str, ...]:
    settings = read_json(file, "pooling config")
    if unknown := sorted(settings.keys() - _POOLING.keys() - set(_OTHERS)):
        raise ConversionError(f"{file}: the setting {unknown[0]} is unknown, so embeddings might differ")
    if prompt and settings.get("include_prompt") is False:
        raise ConversionError(f"{file}: the prompt {prompt!r} is left out of the pooling, which ONNX export lacks")
    mode = settings.get("pooling_mode")
    if mode is None:
        found = tuple(name for key, name in _POOLING.items() if settings.get(key) is True)
    else:
        named = [mode] if isinstance(mode, str) else list(mode)
        found = tuple(name for name in _POOLING.values() if name in named)
        if len(found) != len(named):
            raise ConversionError(f"{file}: the pooling is {mode}, expected of {', '.join(_POOLING.values())}")
    if not found:
        raise CheckpointError(f"{file}: no pooling is chosen, expected one of {', '.join(_POOLING)}")
    return found


def _optional(file: Path) -> Mapping[str, Any]:
    return read_json(file, "settings") if file.is_file() else {}
