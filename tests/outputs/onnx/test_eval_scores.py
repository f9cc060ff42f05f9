"""How well a model does on eval data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.companions.preprocessor_folders import IMAGES, VIT, image_model, refusal, save_picture

from converters.errors import VerificationError
from converters.inference.preprocessing import open_preprocessor
from converters.outputs.onnx.eval_data import EvalData, Score, agreement, batches, read_eval_data, score_of


def numbers(examples: Sequence[str]) -> dict[str, np.ndarray]:
    """A preprocessor of numbers."""
    return {"input": np.array([float(one) for one in examples], np.float32)}


def data_of(inputs: Sequence[float], targets: Sequence[float]) -> EvalData:
    return EvalData("numbers", tuple(str(one) for one in inputs), np.array(targets))


def near(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits of the classes 0, 1, 2: the nearest number."""
    return -np.abs(inputs["input"][:, None] - np.arange(3, dtype=np.float32))


def test_images_are_measured_from_files(tmp_path: Path):
    colours = {"red": (200, 10, 20), "green": (10, 220, 30), "blue": (0, 0, 250)}
    for name, colour in colours.items():
        for i in range(3):
            save_picture(tmp_path / "colours" / name / f"{i}.png", Image.new("RGB", (9, 5 + i), colour))
    save_picture(tmp_path / "colours" / "blue" / "wrong.png", Image.new("RGB", (9, 5), colours["red"]))
    model = image_model(tmp_path / "model", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    data = read_eval_data(tmp_path / "colours", IMAGES, ["red", "green", "blue"])
    found = score_of(
        lambda inputs: inputs["pixel_values"].mean((2, 3)), batches(data, open_preprocessor(model, IMAGES, VIT))
    )
    assert found.summary() == {"count": 10, "accuracy": 0.9}
    assert found.predictions.tolist() == [2, 2, 2, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_example_counts_once_whatever_the_batches(batch_size: int):
    data = data_of([0.1, 1.2, 1.9, 0.8, 2.4], [0, 1, 0, 1, 1])
    sizes = []

    def logits(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        sizes.append(len(inputs["input"]))
        return near(inputs)

    found = score_of(logits, batches(data, numbers, batch_size))
    assert found.summary() == {"count": 5, "accuracy": 0.6}
    assert found.predictions.tolist() == [0, 1, 2, 1, 2]
    assert sum(sizes) == 5
    assert max(sizes) == min(batch_size, 5)


def test_several_models_are_measured_on_what_was_preprocessed_once():
    calls = []

    def counted(examples: Sequence[str]) -> dict[str, np.ndarray]:
        calls.append(len(examples))
        return numbers(examples)

    prepared = list(batches(data_of([0, 1, 2, 2], [0, 1, 2, 0]), counted, 3))
    right, turned = score_of(near, prepared), score_of(lambda inputs: near(inputs)[:, ::-1], prepared)
    assert calls == [3, 1]
    assert (right.accuracy, turned.accuracy) == (0.75, 0.5)
    assert agreement(right, turned) == 0.25
    assert agreement(right, right) == 1.0


def test_values_are_measured_by_correlation_and_error():
    data = data_of([1, 2, 3, 5], [4.0, 5.0, 7.0, 8.0])
    found = score_of(lambda inputs: 2 * inputs["input"][:, None], batches(data, numbers, 3))
    assert found.predictions.tolist() == [2.0, 4.0, 6.0, 10.0]
    assert found.predictions.dtype == np.float64
    # around their means: -3.5, -1.5, 0.5, 4.5 and -2, -1, 1, 2
    pearson = (7 + 1.5 + 0.5 + 9) / (35 * 10) ** 0.5
    assert found.summary() == {"count": 4, "pearson": pytest.approx(pearson), "mean_absolute_error": 1.5}


def test_a_constant_has_no_correlation():
    found = score_of(lambda inputs: np.ones((len(inputs["input"]), 1)), batches(data_of([1, 2], [0.0, 1.0]), numbers))
    assert json.loads(json.dumps(found.summary())) == {"count": 2, "pearson": None, "mean_absolute_error": 0.5}


def test_agreement_of_values_falls_with_a_shift_and_with_a_scale():
    def score(*values: float) -> Score:
        return Score(len(values), np.array(values), pearson=1.0, mean_absolute_error=0.0)

    assert agreement(score(1, 2, 3), score(1, 2, 3)) == 1.0
    assert agreement(score(1, 2, 3), score(2, 3, 4)) == pytest.approx((4 / 3) / (2 / 3 + 2 / 3 + 1))
    assert agreement(score(1, 2, 3), score(2, 4, 6)) == pytest.approx((8 / 3) / (2 / 3 + 8 / 3 + 4))
    assert agreement(score(1, 2, 3), score(3, 2, 1)) == pytest.approx(-1.0)
    assert agreement(score(2, 2), score(2, 2)) == 1.0
    assert agreement(score(2, 2), score(3, 3)) == 0.0
    with pytest.raises(ValueError, match="scores of 2 and of 3 examples cannot be compared"):
        agreement(score(1, 2), score(1, 2, 3))


@pytest.mark.parametrize(
    ("logits", "targets", "wanted"),
    [
        (np.zeros((1, 3)), [0, 1], r"gives logits \(1, 3\), expected \(2, labels\)"),
        (np.zeros((2, 4, 3)), [0, 1], r"gives logits \(2, 4, 3\), expected \(2, labels\)"),
        (np.zeros((2, 3)), [0.0, 1.0], r"gives logits \(2, 3\), expected \(2, 1\)"),
        (np.array([[0, 1], [np.nan, 1]]), [0, 1], "gives logits that are NaN or infinite"),
        (np.array([[0, 1], [np.inf, 1]]), [0, 1], "gives logits that are NaN or infinite"),
    ],
)
def test_logits_that_say_nothing_are_refused(logits: np.ndarray, targets: list, wanted: str):
    with pytest.raises(VerificationError, match=wanted) as error:
        score_of(lambda inputs: logits, batches(data_of([1, 2], targets), numbers))
    refusal(error)
