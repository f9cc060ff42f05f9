"""File names that several packages look for."""

MODEL_CONFIG = "config.json"  # a folder without it is not a model
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_NAME = "peanut_manifest.json"  # only in folders that this toolkit wrote
ADAPTER_CONFIG = "adapter_config.json"
NATIVE_CONFIG = "peanut_config.json"
NATIVE_WEIGHTS = "peanut_theta.safetensors"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
RED_WEIGHTS = "delta_vector.pth"  # the head is beside it
MLX_WEIGHTS = "adapters.safetensors"  # of mlx-lm; checkpoints of the training may lie beside it
BASE_RECORD = "peanut_base.json"  # next to an adapter: the base it belongs to
