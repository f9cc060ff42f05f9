"""DEFT whose orthogonal factor is not unique."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from support.damage import changed
from support.method_zoo import CASES
from support.peft_methods import MODELS, train
from support.tiny_models import edit_weights

from converters import merge
from converters.errors import ThetaError


def trained(tmp_path: Path, config: PeftConfig) -> Path:
    train(MODELS["llama"](), config, tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:, [0, 1, 2, 0]], "columns of deft_P are not independent"),
        (lambda p: torch.cat([p[:1] * torch.tensor([1e-7, 1, 1, 1]), p[1:]]), "decided by rounding"),
    ],
)
def test_an_orthogonal_factor_that_is_not_unique(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    adapter = trained(tmp_path, CASES["deft qr"].on("llama"))
    edit_weights(adapter / "adapter_model.safetensors", changed("deft_P", change))
    with pytest.raises(ThetaError, match=message):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
