"""Every method in the forms of an ONNX export that it has, against HF PEFT's unmerged model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import BeftConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PeftModel
from support.method_zoo import CASES
from support.paths import DATA
from support.peft_methods import train
from transformers import ViTForImageClassification

from converters.api.exporting import export_onnx
from converters.errors import ConversionError
from converters.inference.session import Session
from converters.outputs.onnx.plan import ExportOptions, Form

BASE = DATA / "vit-tiny" / "base"
PIXELS = np.random.default_rng(2).standard_normal((3, 1, 16, 16), np.float32)
METHODS: dict[str, tuple[PeftConfig, str]] = {
    "dora": (LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]), "‖W0 + s·BA‖"),
    "ia3": (IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]), "l ⊙ W0"),
    "beft": (BeftConfig(target_modules=["q_proj"]), "b_trained"),
    "lora-convolution": (LoraConfig(r=4, target_modules=["projection"]), "LoRA on a convolution"),
    "dora-convolution": (LoraConfig(r=4, use_dora=True, target_modules=["projection"]), "DoRA on a convolution"),
    "ln": (LNTuningConfig(target_modules=["layernorm_before", "layernorm_after"]), "W_trained"),
}


def model() -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(BASE, dtype=torch.float32)


def logits(found: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return found.eval()(torch.from_numpy(PIXELS)).logits.numpy()


@pytest.mark.slow  # traces a model in every form
@pytest.mark.parametrize("name", METHODS)
def test_every_form_answers_as_peft(name: str, tmp_path: Path) -> None:
    config, formula = METHODS[name]
    base, adapter = tmp_path / "base", tmp_path / name
    train(model(), config, base, adapter)
    fresh = ViTForImageClassification.from_pretrained(base, dtype=torch.float32)
    before = logits(fresh)
    wanted = logits(PeftModel.from_pretrained(fresh, adapter))
    assert np.abs(wanted - before).max() > 1e-3 * np.abs(wanted).max()  # else the adapter does nothing
    for form in (Form.MERGED, Form.SHARED, Form.SELF_MERGING):
        folder = tmp_path / form.value
        export_onnx(base, adapter, folder, options=ExportOptions(form=form))
        graph = folder / ("model.onnx" if form is Form.MERGED else f"{name}.onnx")
        found = Session(graph).run({"pixel_values": PIXELS})
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=form.value)
        card = (folder / "README.md").read_text()
        assert formula in card
        assert "PEANuT" not in card
    with pytest.raises(ConversionError, match=r"not of low rank|updates no weight|is of the bias|of a convolution"):
        export_onnx(base, adapter, tmp_path / "swapped", options=ExportOptions(form=Form.SWAPPABLE))
    assert not (tmp_path / "swapped").exists()


# cases of the zoo whose formula ONNX has no operators for
NO_OPERATORS = {
    "oft exact", "boft", "fourierft", "deft qr", "deft square", "deft para", "osf", "osf low", "psoft",
    "psoft series", "psoft free", "frod", "waveft", "waveft sym4", "waveft without idwt", "kasa",
}  # fmt: skip


@pytest.mark.slow  # a trace for each
@pytest.mark.parametrize("name", CASES)
def test_every_method_merges_itself_or_says_why_not(name: str, tmp_path: Path) -> None:
    case, base, adapter = CASES[name], tmp_path / "base", tmp_path / "task"
    config = case.config(target_modules=["layers.0.attention.q_proj", "layers.1.mlp.fc2"], **case.settings)
    train(model(), config, base, adapter)
    options = ExportOptions(form=Form.SELF_MERGING)
    if name in NO_OPERATORS:
        with pytest.raises(ConversionError, match="cannot merge a .* adapter by itself.*leave --self-merging out"):
            export_onnx(base, adapter, tmp_path / "out", options=options)
        assert not (tmp_path / "out").exists()
        return
    export_onnx(base, adapter, tmp_path / "out", options=options)
    fresh = ViTForImageClassification.from_pretrained(base, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(fresh, adapter))
    found = Session(tmp_path / "out" / "task.onnx").run({"pixel_values": PIXELS})
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_what_has_a_low_rank_is_swapped(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "task"
    train(
        model(), CASES["gralora"].config(target_modules=["q_proj", "fc2"], **CASES["gralora"].settings), base, adapter
    )
    export_onnx(base, adapter, tmp_path / "out", options=ExportOptions(form=Form.SWAPPABLE))
    assert (tmp_path / "out" / "task.onnx_adapter").exists()
