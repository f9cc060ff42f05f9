"""What transformers knows about a model class: its tensor names, shapes and ties.

Importing transformers takes seconds, so a merge imports it only if it needs to: when the tensor names of adapter and
checkpoint differ, or when more than linear layers is adapted, and the base is no plain decoder (`plain_decoders.py`).
The class is built on the meta device, without weights. The renamings between checkpoint and memory are those of
`transformers/conversion_mapping.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from converters.errors import PeanutError, TargetError, UnknownModelError
from converters.models.config import untagged
from converters.models.conversion import Conversion, find_conversion
from converters.models.convolutions import find_obstacles

# PEFT's task types (peft/utils/peft_types.py) and the auto classes that load such models
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "IMAGE_CLS": "AutoModelForImageClassification",  # not a task type of PEFT; the authors' vision code trains it
}


# the tasks whose model class depends on the head that the adapter includes
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "IMAGE_CLS")

# what a config says about how its model is run, at any depth: kernels may be absent here, and names do not depend on
# them (`transformers/modeling_utils.py`, `_check_and_adjust_attn_implementation`)
_RUNTIME_KEYS = {"dtype", "torch_dtype", "experts_implementation", "_experts_implementation", "attn_implementation"}
_RUNTIME_KEYS |= {f"_attn_implementation{end}" for end in ("", "_internal", "_autoset")}


def ends_by_pad_token(model_type: str, by_default: bool) -> bool:
    """Whether a classifier on this model finds the end of a text by a pad token that its config has to name.

    Args:
        model_type: as in a config; of a model that transformers does not know, nothing is known.
        by_default: the config does not say, so that the default of its class counts.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return not by_default or getattr(CONFIG_MAPPING[model_type](), "pad_token_id", None) is None


@dataclass(frozen=True, eq=False)
class Architecture:
    """The tensor names of one model class, as transformers uses them in memory.

    Attributes:
        name: the class name, as in `architectures` of a config.
        shapes: the shape of every tensor of its state dict.
        linear: names of its nn.Linear modules.
        tied: alias -> the tensor it is tied to.
        prefix: its `base_model_prefix` (`vit`, `bert`, `model`), or empty if it has no such submodule.
        num_labels, vocab_size: the sizes that the config states or implies.
        transposed: modules whose parameters of experts are (experts, in, out).
        settings: module -> its class and its plain attributes, by name.
        embeddings: names of the weights of the input and the output embedding, as far as it has them.
        obstacles: convolutions whose weight cannot do what PEFT computes beside them -> why.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    tied: Mapping[str, str]
    prefix: str
    num_labels: int
    vocab_size: int | None
    transposed: frozenset[str]
    settings: Mapping[str, Mapping[str, Any]]
    embeddings: tuple[str, ...]
    obstacles: Mapping[str, str]
    _rename: Callable[[str], tuple[str, str | None]]
    _optional: tuple[str, ...]
    _converters: tuple[Any, ...]

    def canonical(self, name: str) -> str:
        """The name in memory of the tensor that an old or new checkpoint or adapter calls `name`."""
        return name if name in self.shapes else self._rename(name)[0]

    def module(self, name: str) -> str:
        """The name in memory of a module that has parameters of its own."""
        inside = f"{self.prefix}.{name}"
        return inside if any(shape.startswith(f"{inside}.") for shape in self.shapes) else name

    def converted(self, name: str) -> bool:
        """Whether transformers fuses or splits the tensor that a checkpoint calls `name` when loading it."""
        return self._rename(name)[1] is not None

    def conversion(self, name: str) -> Conversion | None:
        """What becomes of a tensor that is `converted`; None if that is not known here."""
        canonical, pattern = self._rename(name)
        return None if pattern is None else find_conversion(name, canonical, pattern, self._converters)

    def is_expert(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is one expert of a parameter in memory."""
        found = self.conversion(name) if name not in self.shapes else None
        return found is not None and found.expert is not None

    def optional(self, name: str) -> bool:
        """Whether transformers silently loads a checkpoint without this tensor."""
        return any(re.search(pattern, name) for pattern in self._optional)


def build_architecture(
    config: Mapping[str, Any], class_name: str | None = None, task_type: str | None = None
) -> Architecture:
    """Build `class_name`, or the class that loads `task_type`, for `config` without weights.

    Attention is eager in it, whichever kernel the config names.

    Raises `TargetError` if transformers cannot build it; `UnknownModelError` if it lacks the model type or the class,
    or supports it only with remote code.
    """
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model_type = _known_type(config)
    try:
        native = transformers.CONFIG_MAPPING[model_type].from_dict(untagged(_without_runtime(config)))
        native._attn_implementation = "eager"  # in nested configs as well
        with torch.device("meta"):
            model = _build(transformers, native, class_name, task_type)
    except PeanutError:
        raise
    except Exception as error:  # constructors of models raise anything for a config they cannot use
        kind = UnknownModelError if config.get("auto_map") else TargetError  # its own code may use other settings
        raise kind(_not_built(error, model_type, class_name)) from None
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()

    @cache
    def rename(name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return found

    return Architecture(
        name=type(model).__name__,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        linear=frozenset(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)),
        tied=dict(model.all_tied_weights_keys),
        prefix=prefix,
        num_labels=native.num_labels,
        vocab_size=getattr(native.get_text_config(), "vocab_size", None),
        transposed=frozenset(n for n, m in model.named_modules() if getattr(m, "is_transposed", False)),
        settings={name: _plain_attributes(module) for name, module in model.named_modules()},
        embeddings=_embeddings(model),
        obstacles=find_obstacles(model),
        _rename=rename,
        _optional=tuple(ignored),
        _converters=tuple(converters),
    )


def _known_type(config: Mapping[str, Any]) -> str:
    import transformers

    model_type = str(config.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        raise UnknownModelError(
            f"the tensor names of adapter and base differ, and transformers {transformers.__version__}, which would "
            f"translate them, does not know the model type {model_type!r}"
            + (" (models with remote code are not run)" if config.get("auto_map") else "")
        )
    return model_type


def part_config(config: Mapping[str, Any], class_name: str) -> dict[str, Any] | None:
    """The config of `class_name`, if that is a class for one part of a model: `CLIPVisionModel` of a CLIP."""
    import transformers

    part: Any = getattr(getattr(transformers, class_name, None), "config_class", None)
    key = getattr(part, "base_config_key", "")
    own = config.get(key) if key and part.model_type != config.get("model_type") else None
    return {**own, "model_type": part.model_type} if isinstance(own, dict) else None


def _without_runtime(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_runtime(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _RUNTIME_KEYS
    }


def _plain_attributes(module: Any) -> dict[str, Any]:
    """The class of a module, and its attributes that are numbers or words."""
    found = {
        name: value for name, value in vars(module).items() if type(value) in (bool, int, float, str, type(None))
    }
    return {**found, "class": type(module).__name__}


def _embeddings(model: Any) -> tuple[str, ...]:
    """The names of the weights of the input and the output embedding."""
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # of models without words
        return ()
    names = [next((name for name, one in model.named_modules() if one is module), None) for module in found]
    return tuple(f"{name}.weight" for name, module in zip(names, found, strict=True) if name and module is not None)


def _not_built(error: Exception, model_type: str, class_name: str | None) -> str:
    import transformers

    cause = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"transformers {transformers.__version__} cannot build {class_name or model_type} from the base's "
        f"config ({type(error).__name__}: {cause}){_other_base(transformers, model_type, class_name)}"
    )


def _other_base(transformers: Any, model_type: str, class_name: str | None) -> str:
    """The end of a message, if `class_name` is a class for another type of model."""
    config_class = getattr(getattr(transformers, class_name or "", None), "config_class", None)
    meant = getattr(config_class, "model_type", model_type)
    if meant == model_type:
        return ""
    return (
        f": the adapter is for the model type {meant!r}, the base has {model_type!r}; "
        "is this the base it was trained on?"
    )


def _build(transformers: Any, config: Any, class_name: str | None, task_type: str | None) -> Any:
    if class_name is not None:
        model_class = getattr(transformers, class_name, None)
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            raise UnknownModelError(f"transformers {transformers.__version__} has no model class {class_name}")
        return model_class(config)
    auto = getattr(transformers, AUTO_CLASSES.get(task_type or "", "AutoModel"))
    try:
        return auto.from_config(config)
    except ValueError:
        inner = getattr(config.get_text_config(), "model_type", config.model_type)
        contained = "" if inner == config.model_type else "; if it was trained on its language model, give that alone"
        raise TargetError(
            f"transformers {transformers.__version__} has no {auto.__name__} for the model type {config.model_type}; "
            f"is this the base it was trained on?{contained}"
        ) from None
