"""What is kept of decompositions: only what belongs to a weight, and not for long."""

import torch

from converters.methods.spectral.remembering import remembering


def test_a_weight_is_known_by_its_numbers() -> None:
    calls = []

    @remembering
    def total(weight: torch.Tensor, factor: float, other: torch.Tensor | None = None) -> float:
        calls.append(weight)
        return float(weight.sum()) * factor + (0 if other is None else float(other.sum()))

    one, two = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert [total(one, 1.0), total(one.clone(), 1.0), total(one.T.contiguous().T, 1.0)] == [6, 6, 6]
    assert len(calls) == 1
    assert [total(one, 2.0), total(one, 1.0, two), total(one, 1.0, other=one)] == [12, 18, 12]
    assert [total(one.T, 1.0), total(one.double(), 1.0)] == [6, 6]
    assert len(calls) == 6, "another factor, tensor, shape or dtype is another question"
    one += 1
    assert total(one, 1.0) == 12, "it was changed in place"


def test_no_more_than_two_weights_are_kept() -> None:
    calls = []

    @remembering
    def note(weight: torch.Tensor) -> None:
        calls.append(float(weight))

    for number in (0, 1, 0, 2, 0):
        note(torch.tensor([float(number)]))
    assert calls == [0, 1, 2, 0]
