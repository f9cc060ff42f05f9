"""Sound files as inputs of models, against transformers' feature extractors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.media.sound_files import save_sound, sound
from support.onnx_zoo.sound_rows import AST, WAVES, WHISPER
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from converters.errors import CheckpointError, OptionError
from converters.inference.audio import AudioPreprocessor
from converters.inference.kinds import find_kind
from converters.inference.preprocessing import open_preprocessor

WAV2VEC2 = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForSequenceClassification"], **WAVES}
SPECTROGRAM = {"model_type": "audio-spectrogram-transformer", "architectures": ["ASTForAudioClassification"], **AST}
WHISPERS = {"model_type": "whisper", "architectures": ["WhisperForAudioClassification"], **WHISPER}
MODELS = {
    "wav2vec2": (WAV2VEC2, lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True)),
    "wav2vec2-as-they-are": (WAV2VEC2, lambda: Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False)),
    "ast": (SPECTROGRAM, lambda: ASTFeatureExtractor(max_length=64, num_mel_bins=32)),
    "whisper": (WHISPERS, lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=1)),
}


def opened(folder: Path, config: dict[str, Any]) -> AudioPreprocessor:
    found = open_preprocessor(folder, find_kind(config), config)
    assert isinstance(found, AudioPreprocessor)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_as_transformers(name: str, tmp_path: Path) -> None:
    """Two of one length in a batch, a shorter and a longer one by themselves."""
    config, make = MODELS[name]
    extractor = make()
    extractor.save_pretrained(tmp_path)
    preprocessor, rate = opened(tmp_path, config), extractor.sampling_rate
    for lengths in ((rate // 2,) * 2, (701,), (2 * rate + 3,)):
        sounds = [sound(length, seed) for seed, length in enumerate(lengths)]
        files = [save_sound(tmp_path / f"{i}.wav", one, rate, 32, 3) for i, one in enumerate(sounds)]
        found = preprocessor(files)
        assert list(found) == list(find_kind(config).inputs)
        (values,) = found.values()
        assert values.dtype == np.float32
        for row, one in zip(values, sounds, strict=True):
            given = one[:, 0].astype(np.float32)
            wanted = extractor(given, sampling_rate=rate, return_tensors="np")
            np.testing.assert_array_equal(row, wanted[extractor.model_input_names[0]][0])


def test_a_file_that_does_not_name_the_class(tmp_path: Path) -> None:
    """As that of wav2vec2-base, in a folder without a config.json."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": 16000}))
    (values,) = opened(tmp_path, WAV2VEC2)([save_sound(tmp_path / "a.wav", sound(500))]).values()
    assert values.shape == (1, 500)
    assert abs(values.std() - 1) < 1e-3


def test_samples_of_different_lengths(tmp_path: Path) -> None:
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    files = [save_sound(tmp_path / f"{length}.wav", sound(length)) for length in (500, 600)]
    with pytest.raises(OptionError, match="sounds of 500 and of 600 samples cannot be in one batch"):
        opened(tmp_path, WAV2VEC2)(files)


def test_what_a_model_cannot_take(tmp_path: Path) -> None:
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    preprocessor = opened(tmp_path, WAV2VEC2)
    with pytest.raises(OptionError, match=r"b\.wav: has 44100 samples per second, but .* 16000; .*-ar 16000 "):
        preprocessor([save_sound(tmp_path / "b.wav", sound(500), 44100)])
    with pytest.raises(OptionError, match=r"c\.wav: has 40 samples, the model takes 45 or more"):
        preprocessor([save_sound(tmp_path / "c.wav", sound(40))])
    with pytest.raises(OptionError, match="'hello' is a text, expected a sound file"):
        preprocessor(["hello"])


def test_extractors_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json; expected the one"):
        opened(tmp_path, WAV2VEC2)
    ASTFeatureExtractor(max_length=65, num_mel_bins=32).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"of the shape \(65, 32\), but the model takes \(64, 32\)"):
        opened(tmp_path, SPECTROGRAM)
    with pytest.raises(CheckpointError, match=r"of the shape \(65, 32\), but the model takes \(16000,\)"):
        opened(tmp_path, WAV2VEC2)
    with pytest.raises(CheckpointError, match="cannot be used"):
        opened(tmp_path, WHISPERS)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": "high"}))
    with pytest.raises(CheckpointError, match="cannot be used"):
        opened(tmp_path, SPECTROGRAM)
