"""The merged model in torch: graphs are traced from it, and compared with it.

The base is loaded by transformers itself, which finds and renames its tensors without our help. A task's tensors then
take the place of the base's in one forward pass; nothing is copied.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.files.reader import TensorReader
from converters.inference.kinds import ModelKind
from converters.inference.media_models import receptive_field
from converters.inference.text_models import TEXT_MODELS
from converters.models.checkpoint import Checkpoint
from converters.models.config import untagged
from converters.outputs.onnx.graphs.pooling import pool
from converters.plans.merge import Plan

_LABELS = ("id2label", "label2id", "num_labels")  # keys of a config
# pairs of batch size and, for texts, length
_SHAPES = ((1, 5), (2, 12), (5, 31))


class Reference(torch.nn.Module):
    """The class of tasks that share a graph with the base's weights, in float32.

    Args:
        plans: of the tasks; the first one has the config and the base.
        kind: what the graph computes.
        shape: of one image or spectrogram, where it takes these.
        interpolates: whether embeddings of positions are interpolated for images of another size.

    Attributes:
        settings: what the model's forward pass gets besides its inputs.

    Raises `ConversionError` when transformers cannot load the base into that class.
    """

    def __init__(
        self, plans: Sequence[Plan], kind: ModelKind, shape: tuple[int, ...] | None, interpolates: bool = False
    ) -> None:
        super().__init__()
        self.kind = kind
        self._shape = shape
        self.model, self.missing = _load(plans)
        known = TEXT_MODELS.get(plans[0].config["model_type"])
        self.settings: dict[str, bool] = {"use_cache": False} if known is not None and known.decodes else {}
        if interpolates:
            self.settings["interpolate_pos_encoding"] = True
        text = self.model.config.get_text_config()
        self._pad_id: int | None = getattr(text, "pad_token_id", None)
        self._vocab_size = int(getattr(text, "vocab_size", 0))
        self._longest = int(getattr(text, "max_position_embeddings", 512)) - 2  # RoBERTa's positions begin at 2

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the kind, for its inputs in order."""
        named = dict(zip(self.kind.inputs, inputs, strict=True))
        if "image_embeds" in self.kind.outputs and hasattr(self.model, "get_image_features"):
            return (self.model.get_image_features(**named, **self.settings).pooler_output,)
        found = self.model(**named, **self.settings)
        if self.kind.sentences is not None:
            return (pool(found["last_hidden_state"], named["attention_mask"], self.kind.sentences),)
        return tuple(found[name] for name in self.kind.outputs)

    def weights(self) -> dict[str, Tensor]:
        """Every floating tensor of the state dict, by its name in transformers' memory."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if tensor.is_floating_point()}

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs with the tensors `changed`, which may have other sizes, instead of the base's."""
        tensors = {f"model.{name}": tensor for name, tensor in changed.items()}
        given = tuple(inputs[name] for name in self.kind.inputs)
        outputs: tuple[Tensor, ...] = torch.func.functional_call(self, tensors, given)
        return outputs

    def random_inputs(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """Inputs of several batch sizes; texts also of several lengths, some of them padded left or right."""
        generator = torch.Generator().manual_seed(seed)
        return [self._random(1 if self.kind.single else batch, length, generator) for batch, length in _SHAPES]

    def _random(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.kind.takes_files:
            shape = self._shape or _samples(self.model.config, length)
            return {self.kind.inputs[0]: torch.randn(batch, *shape, generator=generator)}
        length = min(length, self._longest)
        ids = torch.randint(0, self._vocab_size, (batch, length), generator=generator)
        mask = torch.ones(batch, length, dtype=torch.long)
        if batch > 1:
            mask[-1, max(1, length // 2) :] = 0
            mask[0, : length // 3] = 0
        if self._pad_id is not None and 0 <= self._pad_id < self._vocab_size:  # what a decoder's classifier looks for
            ids[mask == 0] = self._pad_id
        types = torch.zeros_like(ids)
        types[:, length // 2 :] = int(getattr(self.model.config, "type_vocab_size", 1) > 1)
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {name: made[name] for name in self.kind.inputs}


def _samples(config: Any, frames: int) -> tuple[int]:
    """The shape of a sound that a model of samples makes some frames of."""
    field, hop = receptive_field(config)
    return (field + hop * frames - 1,)


def _load(plans: Sequence[Plan]) -> tuple[Any, frozenset[str]]:
    """The model, and the names of the tensors that the base lacks, or has in another size."""
    import transformers
    from transformers.utils import logging

    plan = plans[0]
    name = plan.config["architectures"][0]
    settings = {key: value for key, value in plan.config.items() if key not in ("dtype", "torch_dtype")}
    if name == plan.base.architecture:  # it has a head, whose labels may differ from the task's
        settings = {key: value for key, value in settings.items() if key not in _LABELS}
        settings |= {key: value for key, value in plan.base.config.items() if key in _LABELS}
    config = transformers.CONFIG_MAPPING[str(plan.config["model_type"])].from_dict(untagged(settings))
    model_class = getattr(transformers, name)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # no warning about a missing head: it is handled
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            **_weights_of(plan.base), config=config, dtype=torch.float32, attn_implementation="eager",
            local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises many kinds for weights it cannot use
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"transformers {transformers.__version__} cannot load {plan.base.folder} as {model_class.__name__}: "
            f"{cause}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    missing = frozenset(info["missing_keys"]) | {_name(key) for key in info["mismatched_keys"]}
    return model.eval(), missing - _fill_untied(plans, model, missing)


def _fill_untied(plans: Sequence[Plan], model: Any, missing: frozenset[str]) -> set[str]:
    """Give a head that is no longer tied the weight that it shared in the base; returns the names of those.

    One task may replace it, and another one adapt it.
    """
    state = model.state_dict()
    tensors = [tensor for plan in plans for tensor in plan.tensors]
    found = {tensor.name: tensor.source for tensor in tensors if tensor.source and tensor.name in missing}
    with TensorReader() as reader, torch.no_grad():
        for name, source in found.items():
            state[name].copy_(reader.whole(source))
    return set(found)


def _weights_of(base: Checkpoint) -> dict[str, Any]:
    """Where transformers takes a base's weights from: the folder, or its tensors where those in there are others."""
    if base.original is None:
        return {"pretrained_model_name_or_path": base.folder}
    with TensorReader() as reader:
        tensors = {name: reader.whole(info) for name, info in base.tensors.items()}
    return {"pretrained_model_name_or_path": None, "state_dict": tensors}


def _name(mismatched: str | Sequence[Any]) -> str:
    """The entries are (name, shape, shape)."""
    return mismatched if isinstance(mismatched, str) else str(mismatched[0])
