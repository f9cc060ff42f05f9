"""Models that can be exported, each tiny, with what is adapted: the rows of the table in converters/README.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeanutConfig

from converters.outputs.onnx.options import Form

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
QV, QUERY_VALUE = ["q_proj", "v_proj"], ["query", "value"]
HEAD, PROJECTED = ["classifier"], ["projector", "classifier"]
HIDDEN = ("last_hidden_state",)
ALL = tuple(Form)
NOT_SWAPPABLE = (Form.MERGED, Form.SHARED, Form.SELF_MERGING)  # what an adapter of convolutions has


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
        tested: the forms in which the slow tests export it; `make onnx-models` takes all.
        forms: those that make sense.
        shape: of an image or a spectrogram; by default of an image of the config's size.
        lengths: numbers of samples of sounds.
        processor: makes inputs of files.
        embed: what is compared, where it is no output of the model: of the adapted model and its inputs.
        pooling: of a folder of sentence-transformers, as in `pooling_mode_NAME`.
    """

    model: str
    model_class: type[tf.PreTrainedModel]
    settings: dict[str, Any]
    targets: list[str]
    heads: list[str] | None
    outputs: tuple[str, ...] = ("logits",)
    labels: tuple[int, ...] = (5, 1)
    adapter: Callable[..., Any] = PeanutConfig
    tested: tuple[Form, ...] = ()
    forms: tuple[Form, ...] = ALL
    shape: tuple[int, ...] | None = None
    lengths: tuple[int, ...] = ()
    processor: Callable[[], Any] | None = None
    embed: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    pooling: tuple[str, ...] = ()

    def config(self) -> tf.PretrainedConfig:
        return self.model_class.config_class(**self.settings)

    def example(self, turn: int) -> tuple[int, ...]:
        """The shape of an image, a spectrogram or a sound."""
        if self.lengths:
            return (self.lengths[turn],)
        size = self.settings.get("vision_config", self.settings).get("image_size")
        return self.shape or (3, size, size)


def lora(**settings: Any) -> LoraConfig:
    own = {name: settings[name] for name in ("r", "target_modules", "modules_to_save")}
    return LoraConfig(**own, init_lora_weights=False)


def transposed_lora(**settings: Any) -> LoraConfig:
    """A LoRA on layers that store their weights transposed."""
    found = lora(**settings)
    found.fan_in_fan_out = True
    return found
