"""Tiny models of images and of sounds, one for each type that is exported, with what is adapted in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeanutConfig

from converters.outputs.onnx.options import Form

LINEAR = (Form.SHARED, Form.SWAPPABLE, Form.SELF_MERGING)
ANY = (Form.SHARED, Form.SELF_MERGING)

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 96, "max_position_embeddings": 20}
TOWERS = {"vision_config": VISION, "text_config": TEXT}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
WAVES = {
    **SIZES, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
}  # fmt: skip
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_layers": 1,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 96, "max_source_positions": 50,
    "num_mel_bins": 16, "classifier_proj_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
EFFICIENT = {
    "image_size": 32, "width_coefficient": 0.05, "depth_coefficient": 0.2, "hidden_dim": 64, "in_channels": [32, 16],
    "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6], "depthwise_padding": [],
}  # fmt: skip
MOBILE = {
    "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "image_size": 64,
    "num_attention_heads": 2, "expand_ratio": 2.0,
}  # fmt: skip
QV, QUERY_VALUE = ["q_proj", "v_proj"], ["query", "value"]
HEAD, PROJECTED = ["classifier"], ["projector", "classifier"]
IMAGE, SMALL, PIXELS = (3, 32, 32), (3, 16, 16), "pixel_values"


def whole(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


@dataclass(frozen=True)
class MediaRow:
    """A tiny model, the modules that are adapted, and those that are trained whole.

    `shape` is that of an example; of a sound as samples, one for each length. `processor` makes it of files.
    """

    model_class: type[tf.PreTrainedModel]
    config: Callable[[], tf.PretrainedConfig]
    targets: list[str] | str
    heads: list[str] | None = None
    input: str = PIXELS
    shape: tuple[int, ...] = SMALL
    lengths: tuple[int, ...] = ()
    output: Callable[[Any, torch.Tensor], torch.Tensor] | str = "logits"
    forms: tuple[Form, ...] = LINEAR
    adapter: type = PeanutConfig
    processor: Callable[[], Any] | None = None

    def inputs(self, batch: int, turn: int) -> dict[str, torch.Tensor]:
        shape = (self.lengths[turn],) if self.lengths else self.shape
        return {self.input: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))}


MEDIA_ROWS = {
    "convnext": MediaRow(
        tf.ConvNextForImageClassification, lambda: tf.ConvNextConfig(**STAGES), ["pwconv1", "pwconv2"], HEAD,
        shape=IMAGE,
        processor=lambda: tf.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.9),
    ),
    "convnextv2": MediaRow(
        tf.ConvNextV2ForImageClassification, lambda: tf.ConvNextV2Config(**STAGES), ["pwconv1", "pwconv2"], HEAD,
        shape=IMAGE, adapter=LoraConfig,
    ),
    "swinv2": MediaRow(
        tf.Swinv2ForImageClassification, lambda: tf.Swinv2Config(**SWIN), QUERY_VALUE, HEAD, shape=IMAGE,
        processor=lambda: tf.ViTImageProcessorPil(**whole(32)),
    ),
    "clip": MediaRow(
        tf.CLIPForImageClassification, lambda: tf.CLIPConfig(**TOWERS), QV, HEAD,
        processor=lambda: tf.CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=whole(16)["size"]),
    ),
    "clip-both-towers": MediaRow(
        tf.CLIPModel, lambda: tf.CLIPConfig(**TOWERS, projection_dim=24), QV,
        output=lambda model, pixels: model.get_image_features(pixels).pooler_output,
    ),
    "clip-vision": MediaRow(
        tf.CLIPVisionModelWithProjection, lambda: tf.CLIPVisionConfig(**VISION, projection_dim=24), QV,
        output="image_embeds",
    ),
    "siglip": MediaRow(
        tf.SiglipForImageClassification, lambda: tf.SiglipConfig(**TOWERS), QV, HEAD,
        processor=lambda: tf.SiglipImageProcessorPil(**whole(16)),
    ),
    "siglip-both-towers": MediaRow(
        tf.SiglipModel, lambda: tf.SiglipConfig(**TOWERS), QV,
        output=lambda model, pixels: model.get_image_features(pixels).pooler_output,
    ),
    "siglip-vision": MediaRow(
        tf.SiglipVisionModel, lambda: tf.SiglipVisionConfig(**VISION), [*QV, "fc1"], output="last_hidden_state"
    ),
    "mobilevit": MediaRow(
        tf.MobileViTForImageClassification, lambda: tf.MobileViTConfig(**MOBILE), QUERY_VALUE, HEAD,
        shape=(3, 64, 64),
        processor=lambda: tf.MobileViTImageProcessorPil(size={"shortest_edge": 72}, crop_size=whole(64)["size"]),
    ),
    "resnet": MediaRow(
        tf.ResNetForImageClassification,
        lambda: tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        ["convolution"], HEAD, shape=IMAGE, forms=ANY, adapter=LoraConfig,
        processor=lambda: tf.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.9),
    ),
    "efficientnet": MediaRow(
        tf.EfficientNetForImageClassification, lambda: tf.EfficientNetConfig(**EFFICIENT),
        ["expand_conv", "project_conv"], HEAD, shape=IMAGE, forms=ANY, adapter=LoraConfig,
        processor=lambda: tf.EfficientNetImageProcessorPil(**whole(32)),
    ),
    "wav2vec2": MediaRow(
        tf.Wav2Vec2ForSequenceClassification,
        lambda: tf.Wav2Vec2Config(**WAVES, feat_extract_norm="layer", do_stable_layer_norm=True), QV, PROJECTED,
        "input_values", lengths=(400, 731),
        processor=lambda: tf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    ),
    "wav2vec2-features": MediaRow(
        tf.Wav2Vec2Model, lambda: tf.Wav2Vec2Config(**WAVES), QV, None, "input_values", lengths=(400, 731),
        output="last_hidden_state",
    ),
    "hubert": MediaRow(
        tf.HubertForSequenceClassification, lambda: tf.HubertConfig(**WAVES, use_weighted_layer_sum=True), QV,
        PROJECTED, "input_values", lengths=(400, 731),
        processor=lambda: tf.Wav2Vec2FeatureExtractor(),
    ),
    "ast": MediaRow(
        tf.ASTForAudioClassification, lambda: tf.ASTConfig(**SIZES, max_length=64, num_mel_bins=32), QV, HEAD,
        "input_values", (64, 32),
        processor=lambda: tf.ASTFeatureExtractor(max_length=64, num_mel_bins=32),
    ),
    "whisper": MediaRow(
        tf.WhisperForAudioClassification, lambda: tf.WhisperConfig(**WHISPER), QV, PROJECTED,
        "input_features", (16, 100),
        processor=lambda: tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    ),
}  # fmt: skip
