import pytest
import torch
from transformers.activations import ACT2FN

from converters.methods.peanut.activations import ACTIVATIONS, WITH_UNSAVED_PARAMETERS


def test_every_activation_of_transformers_is_known() -> None:
    assert set(ACTIVATIONS) | WITH_UNSAVED_PARAMETERS == set(ACT2FN)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_equals_transformers(name: str) -> None:
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    ours, theirs = ACTIVATIONS[name](x), ACT2FN[name](x)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
