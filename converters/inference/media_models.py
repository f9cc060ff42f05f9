"""The models of images that can be exported, by model type, with the inputs of their graphs."""

IMAGE = ("pixel_values",)

MEDIA_MODELS = {
    "vit": IMAGE,
    "deit": IMAGE,
    "dinov2": IMAGE,
    "dinov2_with_registers": IMAGE,
    "swin": IMAGE,
    "beit": IMAGE,
}
