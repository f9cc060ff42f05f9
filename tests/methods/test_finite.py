"""Looking for numbers that are not finite, however many are looked at together."""

import pytest
import torch

from converters.methods.finite import ON_THIS_THREAD, all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, ON_THIS_THREAD - 1, ON_THIS_THREAD, -1])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_number_is_found_anywhere(dtype: torch.dtype, place: int, value: float) -> None:
    numbers = torch.full((2, ON_THIS_THREAD + 5), -torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(numbers) and all_finite(numbers, ON_THIS_THREAD)
    numbers.view(-1)[place] = value
    assert not all_finite(numbers) and not all_finite(numbers, ON_THIS_THREAD)
