"""Models of images."""

import transformers as tf
from support.onnx_zoo.rows import HEAD, QV, SIZES, Row

_VISION = {**SIZES, "image_size": 16, "patch_size": 4}
_DINO = {name: size for name, size in _VISION.items() if name != "intermediate_size"}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

MEDIA_ROWS = {
    "vit": Row("ViT", tf.ViTForImageClassification, _VISION, QV, HEAD, in_tests=True),
    "vit-features": Row("ViT", tf.ViTModel, _VISION, QV, None, ("last_hidden_state",), (3,), in_tests=True),
    "deit": Row("DeiT", tf.DeiTForImageClassification, _VISION, QV, HEAD, in_tests=True),
    "deit-teacher": Row(
        "DeiT", tf.DeiTForImageClassificationWithTeacher, _VISION, QV, ["cls_classifier", "distillation_classifier"],
        in_tests=True,
    ),
    "dinov2": Row("DINOv2", tf.Dinov2ForImageClassification, _DINO, [*QV, "fc1"], HEAD, in_tests=True),
    "dinov2-registers": Row(
        "DINOv2 with registers", tf.Dinov2WithRegistersForImageClassification, _DINO, QV, HEAD, in_tests=True
    ),
    "swin": Row("Swin", tf.SwinForImageClassification, _SWIN, QV, HEAD, in_tests=True),
    "beit": Row(
        "BEiT", tf.BeitForImageClassification, {**_VISION, "use_relative_position_bias": True}, QV, HEAD,
        in_tests=True,
    ),
}  # fmt: skip
