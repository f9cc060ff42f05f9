"""The models of images and of sounds that can be exported, by model type. Imports neither onnx nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_LOGITS, _HIDDEN = ("logits",), ("last_hidden_state",)
_EMBEDDING = ("image-feature-extraction", ("image_embeds",))


class Media(Enum):
    """What a graph takes of a file."""

    IMAGE = "image"  # pixels, all images of one size
    WAVE = "wave"  # the samples of a sound, of any length
    MEL = "mel"  # a spectrogram, all of one size


@dataclass(frozen=True)
class MediaModel:
    """What has to be known of a model type.

    Attributes:
        tasks: suffix of a class name -> (task in the Hub's terms, names of the outputs).
        media: what its graph takes.
        input: the name of that.
        one_size: whether embeddings of positions are stored for images of one size.
        interpolates: whether transformers interpolates them when asked to, by `interpolate_pos_encoding`.
    """

    tasks: Mapping[str, tuple[str, tuple[str, ...]]]
    media: Media = Media.IMAGE
    input: str = "pixel_values"
    one_size: bool = False
    interpolates: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of its graph."""
        return (self.input,)


_IMAGE_TASKS = {
    "ForImageClassification": ("image-classification", _LOGITS),
    "ForImageClassificationWithTeacher": ("image-classification", _LOGITS),
    "Model": ("feature-extraction", _HIDDEN),
    "VisionModel": ("image-feature-extraction", (*_HIDDEN, "pooler_output")),
    "VisionModelWithProjection": _EMBEDDING,
    "CLIPModel": _EMBEDDING,  # its image encoder
    "SiglipModel": _EMBEDDING,
}
_CLASSIFIES_SOUNDS = {
    "ForAudioClassification": ("audio-classification", _LOGITS),
    "ForSequenceClassification": ("audio-classification", _LOGITS),
}
_SOUND_TASKS = {**_CLASSIFIES_SOUNDS, "Model": ("feature-extraction", _HIDDEN)}

_IMAGE = MediaModel(_IMAGE_TASKS)
_RESIZES = MediaModel(_IMAGE_TASKS, interpolates=True)
_ONE_SIZE = MediaModel(_IMAGE_TASKS, one_size=True, interpolates=True)
_WAVE = MediaModel(_SOUND_TASKS, Media.WAVE, "input_values")

MEDIA_MODELS = {
    "vit": _ONE_SIZE,
    "deit": _ONE_SIZE,
    "dinov2": _IMAGE,
    "dinov2_with_registers": _IMAGE,
    "swin": _RESIZES,
    "swinv2": _IMAGE,
    "beit": _RESIZES,
    "convnext": _IMAGE,
    "convnextv2": _IMAGE,
    "clip": _ONE_SIZE,
    "clip_vision_model": _ONE_SIZE,
    "siglip": _ONE_SIZE,
    "siglip_vision_model": _ONE_SIZE,
    "mobilevit": _IMAGE,
    "resnet": _IMAGE,
    "efficientnet": _IMAGE,
    "wav2vec2": _WAVE,
    "hubert": _WAVE,
    "audio-spectrogram-transformer": MediaModel(_SOUND_TASKS, Media.MEL, "input_values"),
    "whisper": MediaModel(_CLASSIFIES_SOUNDS, Media.MEL, "input_features"),
}


def is_wave(model_type: str) -> bool:
    """Whether graphs of this type take samples of any length."""
    return model_type in MEDIA_MODELS and MEDIA_MODELS[model_type].media is Media.WAVE


def image_config(model: Any) -> Any:
    """The part of a config of transformers that describes images."""
    return getattr(model, "vision_config", None) or model


def mel_shape(model: Any) -> tuple[int, int]:
    """The shape of the spectrogram that a model takes: (time, mel) for AST, (mel, time) for Whisper."""
    if model.model_type == "whisper":
        return model.num_mel_bins, 2 * model.max_source_positions  # the encoder halves the time
    return model.max_length, model.num_mel_bins


def receptive_field(model: Any) -> tuple[int, int]:
    """The samples that the first frame of a model of waves depends on, and those between two frames."""
    field, hop = 1, 1
    for kernel, stride in zip(model.conv_kernel, model.conv_stride, strict=True):
        field += (kernel - 1) * hop
        hop *= stride
    return field, hop
