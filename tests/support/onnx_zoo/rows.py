"""Models that can be exported, each tiny, with what is adapted: the rows of the table in converters/README.md."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers as tf
from peft import LoraConfig, PeanutConfig

from converters.outputs.onnx.options import Form

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
QV, HEAD = ["q_proj", "v_proj"], ["classifier"]


@dataclass(frozen=True)
class Row:
    """A tiny model, the modules that are adapted, and those that are trained whole.

    Attributes:
        model: what people call it.
        model_class: of transformers.
        settings: of its config.
        targets: modules that are adapted.
        heads: modules that are trained whole.
        outputs: those that are compared.
        labels: of each task.
        adapter: the class of the adapter's config.
        config_class: where the class of the model does not say it.
        in_tests: whether the slow tests run it; `make onnx-models` runs all rows.
        forms: those that make sense.
    """

    model: str
    model_class: type[tf.PreTrainedModel]
    settings: dict[str, Any]
    targets: list[str]
    heads: list[str] | None
    outputs: tuple[str, ...] = ("logits",)
    labels: tuple[int, ...] = (5, 1)
    adapter: Callable[..., Any] = PeanutConfig
    in_tests: bool = False
    forms: tuple[Form, ...] = field(default=tuple(Form))

    def config(self) -> tf.PretrainedConfig:
        return self.model_class.config_class(**self.settings)


def lora(**settings: Any) -> LoraConfig:
    """A LoRA on layers that store their weights transposed."""
    own = {name: settings[name] for name in ("r", "target_modules", "modules_to_save")}
    return LoraConfig(**own, init_lora_weights=False, fan_in_fan_out=True)
