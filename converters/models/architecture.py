"""What transformers knows about a model class: its tensor names, shapes and ties.

Importing transformers takes seconds, so a merge imports it only if it needs to: when the tensor names of adapter and
checkpoint differ, or when the adapter includes a head. The class is built on the meta device, without weights. The
renamings between checkpoint and memory are those of `transformers/conversion_mapping.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from converters.errors import PeanutError, TargetError
from converters.models.conversion import Conversion, find_conversion

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
        standardized: convolutions that standardise their weight whenever they compute.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    tied: Mapping[str, str]
    prefix: str
    num_labels: int
    vocab_size: int | None
    transposed: frozenset[str]
    standardized: frozenset[str]
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

    def optional(self, name: str) -> bool:
        """Whether transformers silently loads a checkpoint without this tensor."""
        return any(re.search(pattern, name) for pattern in self._optional)


def build_architecture(
    config: Mapping[str, Any], class_name: str | None = None, task_type: str | None = None
) -> Architecture:
    """Build `class_name`, or the class that loads `task_type`, for `config` without weights.

    Raises `TargetError` if this version of transformers lacks the model or supports it only with remote code.
    """
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model_type = str(config.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        raise TargetError(
            f"the tensor names of adapter and base differ, and transformers {transformers.__version__}, which would "
            f"translate them, does not know the model type {model_type!r}"
            + (" (models with remote code are not run)" if config.get("auto_map") else "")
        )
    settings = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    try:
        native = transformers.CONFIG_MAPPING[model_type].from_dict(settings)
        with torch.device("meta"):
            model = _build(transformers, native, class_name, task_type)
    except PeanutError:
        raise
    except Exception as error:  # constructors of models raise anything for a config they cannot use
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise TargetError(
            f"transformers {transformers.__version__} cannot build {class_name or model_type} from the base's "
            f"config ({type(error).__name__}: {cause}){_other_base(transformers, model_type, class_name)}"
        ) from None
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
        standardized=frozenset(n for n, m in model.named_modules() if "WeightStandardized" in type(m).__name__),
        _rename=rename,
        _optional=tuple(ignored),
        _converters=tuple(converters),
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
            raise TargetError(f"transformers {transformers.__version__} has no model class {class_name}")
        return model_class(config)
    auto = getattr(transformers, AUTO_CLASSES.get(task_type or "", "AutoModel"))
    try:
        return auto.from_config(config)
    except ValueError:
        raise TargetError(
            f"transformers {transformers.__version__} has no {auto.__name__} for the model type {config.model_type}; "
            "is this the base it was trained on?"
        ) from None
