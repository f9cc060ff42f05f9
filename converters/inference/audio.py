"""Preprocessing of sound files with a model's feature extractor. Nothing is downloaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CheckpointError, OptionError
from converters.inference.examples import Example, brief, full_config
from converters.inference.images import PROCESSOR_FILE
from converters.inference.kinds import ModelKind
from converters.inference.media_models import is_wave, mel_shape, receptive_field
from converters.inference.sounds import read_sound, sound_name

_WINDOW = 400  # samples of the first frame of a spectrogram, in the extractors of AST and Whisper


class AudioPreprocessor:
    """Turns sound files into `input_values` (batch, samples), or into a spectrogram where the model takes one.

    Every file is preprocessed by itself. Spectrograms are padded and cut to the length that the model takes. Samples
    are not padded: the models take the padding for sound, so files of different lengths are run one by one.

    Args:
        folder: the folder of a model with a preprocessor_config.json.
        kind: the kind of graph, which determines the input.
        config: the config.json of the model.

    Attributes:
        rate: the samples per second that the model was trained on.

    Raises `CheckpointError` if preprocessor_config.json is missing or unusable, or does not match the model.
    """

    def __init__(self, folder: Path, kind: ModelKind, config: Mapping[str, Any]) -> None:
        (self._input,) = kind.inputs
        model = full_config(folder, config)
        self._waves = is_wave(model.model_type)
        self._shortest = receptive_field(model)[0] if self._waves else _WINDOW
        file = folder / PROCESSOR_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: no {PROCESSOR_FILE}; expected the one the model was trained with, as saved by "
                "transformers' feature extractors: it defines how sounds are sampled and normalised"
            )
        try:
            self._extractor = _load_extractor(folder, model)
            self.rate = int(self._extractor.sampling_rate)
            noise = np.random.default_rng(0).random(max(self.rate, self._shortest), np.float32) - 0.5
            shape = self._extract(noise).shape[1:]
        except Exception as error:  # an extractor fails on a bad setting wherever it uses it
            raise CheckpointError(f"{file}: cannot be used ({brief(error)})") from None
        expected = noise.shape if self._waves else mel_shape(model)
        if shape != expected:
            raise CheckpointError(
                f"{file}: turns {len(noise)} samples into {self._input} of the shape {shape}, but the model takes "
                f"{expected}; expected the feature extractor the model was trained with"
            )

    def __call__(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        """The arrays of sound files.

        Raises `OptionError`, naming the file, if one is missing, broken, too short, or has another rate than the
        model; or if files of different lengths are given to a model of samples.
        """
        rows = [self._extract(self._read(example)) for example in examples]
        if len(lengths := sorted({row.shape[1] for row in rows})) > 1:
            raise OptionError(
                f"sounds of {lengths[0]} and of {lengths[-1]} samples cannot be in one batch: padding would change "
                "the outputs; preprocess them one by one"
            )
        return {self._input: np.concatenate(rows)}

    def _read(self, example: Example) -> NDArray[np.float32]:
        if not isinstance(example, Path | bytes):
            raise OptionError(f"{brief(repr(example))} is a text, expected a sound file: the model takes sounds")
        samples, rate = read_sound(example)
        name = sound_name(example)
        if rate != self.rate:
            raise OptionError(
                f"{name}: has {rate} samples per second, but the model was trained on {self.rate}; convert it, as "
                f"by: ffmpeg -i INPUT -ac 1 -ar {self.rate} -c:a pcm_s16le OUTPUT.wav"
            )
        if len(samples) < self._shortest:
            raise OptionError(f"{name}: has {len(samples)} samples, the model takes {self._shortest} or more")
        return samples

    def _extract(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        found = self._extractor([samples], sampling_rate=self.rate, return_tensors="np")
        values: NDArray[np.float32] = found[self._input].astype(np.float32)
        return values


def _load_extractor(folder: Path, model: Any) -> Any:
    from transformers import AutoFeatureExtractor

    # with the config: files of older versions, such as wav2vec2-base's, do not name the class
    return AutoFeatureExtractor.from_pretrained(folder, config=model, local_files_only=True, trust_remote_code=False)
