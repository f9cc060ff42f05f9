"""Graphs that several modules look at. They are read only."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from support.onnx_models import MODELS, Graphs, quantized_graphs


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graphs]:
    return {name: quantized_graphs(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="session")
def pixels() -> dict[str, np.ndarray]:
    """Digits that no adapter was trained on, float32 (397, 1, 16, 16)."""
    images = torch.tensor(load_digits().images[1400:] / 16, dtype=torch.float32)[:, None]
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear", align_corners=False)
    return {"pixel_values": ((images - 0.5) / 0.5).numpy()}
