"""RED in the forms of an ONNX export, against its formula on the outputs of the modules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import DATA
from transformers import ViTForImageClassification

from converters.api.exporting import export_onnx
from converters.inference.session import Session
from converters.outputs.onnx.plan import ExportOptions, Form

BASE = DATA / "vit-tiny" / "base"
PIXELS = np.random.default_rng(2).standard_normal((3, 1, 16, 16), np.float32)


@pytest.mark.slow  # traces a model
@pytest.mark.parametrize("form", [Form.SHARED, Form.SELF_MERGING])
def test_it_answers_as_edited_outputs(form: Form, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(BASE, dtype=torch.float32).eval()
    (tmp_path / "red").mkdir()
    state = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.fc2"):
            scaling, bias = 1 + torch.randn(1, module.out_features) / 3, torch.randn(1, module.out_features) / 5
            state |= {
                f"{name}.delta_vector.activation_scaling": scaling,
                f"{name}.delta_vector.activation_bias": bias,
            }
            module.register_forward_hook(lambda _, __, output, s=scaling, b=bias: output * s + b)
    torch.save(state, tmp_path / "red" / "delta_vector.pth")
    with torch.inference_mode():
        wanted = model(torch.from_numpy(PIXELS)).logits.numpy()
    export_onnx(BASE, tmp_path / "red", tmp_path / "out", options=ExportOptions(form=form))
    found = Session(tmp_path / "out" / "red.onnx").run({"pixel_values": PIXELS})
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
