"""Models of images."""

from typing import Any

import transformers as tf
from support.onnx_zoo.rows import HEAD, HIDDEN, NOT_SWAPPABLE, QUERY_VALUE, QV, SIZES, Row, lora

from converters.outputs.onnx.options import Form

VISION = {**SIZES, "image_size": 16, "patch_size": 4}
TOWERS = {
    "vision_config": VISION,
    "text_config": {**SIZES, "vocab_size": 96, "max_position_embeddings": 20},
}
DINO = {name: size for name, size in VISION.items() if name != "intermediate_size"}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
BEIT = {**VISION, "use_relative_position_bias": True}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
_EFFICIENT = {
    "image_size": 32, "width_coefficient": 0.05, "depth_coefficient": 0.2, "hidden_dim": 64, "in_channels": [32, 16],
    "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6], "depthwise_padding": [],
}  # fmt: skip
_MOBILE = {
    "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "image_size": 64,
    "num_attention_heads": 2, "expand_ratio": 2.0,
}  # fmt: skip
_LAYERS = ["pwconv1", "pwconv2"]
_VISION_OUTPUTS, _EMBEDDING = ("last_hidden_state", "pooler_output"), ("image_embeds",)


def whole(side: int) -> dict[str, Any]:
    """The size of an image processor that resizes to a square."""
    return {"size": {"height": side, "width": side}}


TRANSFORMER_ROWS = {
    "vit": Row(
        "ViT", tf.ViTForImageClassification, VISION, QV, HEAD,
        processor=lambda: tf.ViTImageProcessorPil(**whole(16)),
    ),
    "vit-features": Row("ViT", tf.ViTModel, VISION, QV, None, HIDDEN, (3,)),
    "deit": Row("DeiT", tf.DeiTForImageClassification, VISION, QV, HEAD),
    "deit-teacher": Row(
        "DeiT", tf.DeiTForImageClassificationWithTeacher, VISION, QV, ["cls_classifier", "distillation_classifier"],
    ),
    "dinov2": Row("DINOv2", tf.Dinov2ForImageClassification, DINO, [*QV, "fc1"], HEAD),
    "dinov2-registers": Row(
        "DINOv2 with registers", tf.Dinov2WithRegistersForImageClassification, DINO, QV, HEAD
    ),
    "swin": Row("Swin", tf.SwinForImageClassification, SWIN, QV, HEAD),
    "swinv2": Row(
        "Swin V2", tf.Swinv2ForImageClassification, SWIN, QUERY_VALUE, HEAD,
        processor=lambda: tf.ViTImageProcessorPil(**whole(32)),
    ),
    "beit": Row("BEiT", tf.BeitForImageClassification, BEIT, QV, HEAD),
    "clip": Row(
        "CLIP", tf.CLIPForImageClassification, TOWERS, QV, HEAD, tested=(Form.SHARED,),
        processor=lambda: tf.CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=whole(16)["size"]),
    ),
    "clip-both-towers": Row(
        "CLIP", tf.CLIPModel, {**TOWERS, "projection_dim": 24}, QV, None, _EMBEDDING, (3,), tested=(Form.SWAPPABLE,),
        embed=lambda model, pixels: model.get_image_features(pixels).pooler_output,
    ),
    "clip-vision": Row(
        "CLIP", tf.CLIPVisionModelWithProjection, {**VISION, "projection_dim": 24}, QV, None, _EMBEDDING, (3,)
    ),
    "siglip": Row(
        "SigLIP", tf.SiglipForImageClassification, TOWERS, QV, HEAD,
        processor=lambda: tf.SiglipImageProcessorPil(**whole(16)),
    ),
    "siglip-both-towers": Row(
        "SigLIP", tf.SiglipModel, TOWERS, QV, None, _EMBEDDING, (3,),
        embed=lambda model, pixels: model.get_image_features(pixels).pooler_output,
    ),
    "siglip-vision": Row("SigLIP", tf.SiglipVisionModel, VISION, [*QV, "fc1"], None, _VISION_OUTPUTS, (3,)),
}  # fmt: skip
CONVOLUTION_ROWS = {
    "mobilevit": Row(
        "MobileViT", tf.MobileViTForImageClassification, _MOBILE, QUERY_VALUE, HEAD,
        processor=lambda: tf.MobileViTImageProcessorPil(size={"shortest_edge": 72}, crop_size=whole(64)["size"]),
    ),
    "convnext": Row(
        "ConvNeXt", tf.ConvNextForImageClassification, _STAGES, _LAYERS, HEAD,
        processor=lambda: tf.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.9),
    ),
    "convnextv2": Row("ConvNeXt V2", tf.ConvNextV2ForImageClassification, _STAGES, _LAYERS, HEAD, adapter=lora),
    "resnet": Row(
        "ResNet", tf.ResNetForImageClassification, _RESNET, ["convolution"], HEAD, forms=NOT_SWAPPABLE, adapter=lora,
        shape=(3, 32, 32), tested=(Form.SHARED, Form.SELF_MERGING),
        processor=lambda: tf.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.9),
    ),
    "efficientnet": Row(
        "EfficientNet", tf.EfficientNetForImageClassification, _EFFICIENT, ["expand_conv", "project_conv"], HEAD,
        forms=NOT_SWAPPABLE, adapter=lora,
        processor=lambda: tf.EfficientNetImageProcessorPil(**whole(32)),
    ),
}  # fmt: skip
IMAGE_ROWS = {**TRANSFORMER_ROWS, **CONVOLUTION_ROWS}
