"""Every kind of f in graphs that merge themselves, and sums, against merged checkpoints in transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import DATA
from transformers import ViTForImageClassification

from converters import Orientation, Tweaker, Weighted, load_adapter, merge, open_checkpoint, save_adapter
from converters.api.exporting import export_onnx
from converters.inference.session import LoadedAdapter, Session
from converters.outputs.onnx.plan import ExportOptions, Form

BASE = DATA / "vit-tiny" / "base"
PIXELS = np.random.default_rng(2).standard_normal((3, 1, 16, 16), np.float32)


def theta(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / shape[-1] ** 0.5


def squares(count: int) -> tuple[torch.Tensor, ...]:
    return tuple(theta(4, 4) + i for i in range(count))


TWEAKERS = {
    "columns": Tweaker(Orientation.COLUMNS, theta(4, 192), theta(192, 4), act_fn="silu", scaling=0.3),
    "rows": Tweaker(Orientation.ROWS, theta(4, 192), theta(192, 4), act_fn="sin_2pi", scaling=0.5),
    "free": Tweaker(Orientation.FREE, theta(4, 192), theta(192, 4), act_fn="relu"),
    "deep": Tweaker(Orientation.COLUMNS, theta(4, 192), theta(192, 4), squares(2), squares(2), act_fn="gelu"),
    "no-residual": Tweaker(
        Orientation.ROWS, theta(4, 192), theta(192, 4), squares(1), squares(1), act_fn="tanh", residual=False
    ),
    "leaky": Tweaker(
        Orientation.COLUMNS, theta(4, 192), theta(192, 4), act_fn="leaky_relu", negative_slope=0.3, scaling=0.2
    ),
    "activated": Tweaker(Orientation.ROWS, theta(4, 192), theta(192, 4), output_act_fn="tanh", scaling=0.1),
}


def logits(checkpoint: Path) -> np.ndarray:
    with torch.inference_mode():
        return ViTForImageClassification.from_pretrained(checkpoint)(torch.from_numpy(PIXELS)).logits.numpy()


@pytest.mark.parametrize(
    "name", [name if name == "rows" else pytest.param(name, marks=pytest.mark.slow) for name in TWEAKERS]
)
def test_every_tweaker_merges_itself(name: str, tmp_path: Path) -> None:
    targets = {f"vit.layers.{layer}.attention.k_proj": TWEAKERS[name] for layer in (0, 3)}
    save_adapter(tmp_path / name, targets, base=open_checkpoint(BASE))
    merge(BASE, tmp_path / name, tmp_path / "merged")
    wanted = logits(tmp_path / "merged")
    assert np.abs(wanted - logits(BASE)).max() > 1e-3  # else f does nothing
    export_onnx(BASE, tmp_path / name, tmp_path / "out", options=ExportOptions(form=Form.SELF_MERGING))
    found = Session(tmp_path / "out" / f"{name}.onnx").run({"pixel_values": PIXELS})
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow  # traces a model twice
def test_a_sum_of_adapters(tmp_path: Path) -> None:
    """Every delta is of the original W0; one of the two brings the head."""
    save_adapter(tmp_path / "rows", {"vit.layers.1.attention.q_proj": TWEAKERS["rows"]}, base=open_checkpoint(BASE))
    adapters = [DATA / "vit-tiny" / "oddeven", Weighted(load_adapter(tmp_path / "rows"), -0.5)]
    merge(BASE, adapters, tmp_path / "merged")
    wanted = logits(tmp_path / "merged")
    for form in (Form.SELF_MERGING, Form.SWAPPABLE):
        export_onnx(BASE, adapters, tmp_path / form.value, options=ExportOptions(form=form))
    inputs = {"pixel_values": PIXELS}
    adapter = LoadedAdapter(tmp_path / "swappable" / "oddeven-rows.onnx_adapter")
    for found in (
        Session(tmp_path / "self-merging" / "oddeven-rows.onnx").run(inputs),
        Session(tmp_path / "swappable" / "model.onnx").run(inputs, adapter),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
