"""WAV files as samples."""

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from support.media.sound_files import save_sound, sound

from converters.errors import OptionError
from converters.inference.sounds import read_sound

MONO = struct.pack("<HH", 1, 1)  # the format of integers, and one channel


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(("bits", "code"), [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3)])
def test_every_format(bits: int, code: int, extensible: bool, tmp_path: Path) -> None:
    samples = sound(101)
    found, rate = read_sound(save_sound(tmp_path / "a.wav", samples, 8000, bits, code, extensible))
    assert rate == 8000
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, samples[:, 0], atol=2.0**-bits if code == 1 else 1e-7)


def test_channels_are_averaged(tmp_path: Path) -> None:
    samples = sound(50, channels=2)
    found, _ = read_sound(save_sound(tmp_path / "a.wav", samples, bits=32, code=3))
    np.testing.assert_allclose(found, samples.mean(axis=1), atol=1e-7)


def test_what_the_standard_library_writes(tmp_path: Path) -> None:
    whole = (sound(77)[:, 0] * 32768).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))
        file.writeframes(whole.tobytes())
    found, rate = read_sound(tmp_path / "a.wav")
    assert rate == 22050
    np.testing.assert_array_equal(found, whole / np.float32(32768))


def test_a_sound_that_was_written_to_a_pipe(tmp_path: Path) -> None:
    """Its lengths were not known when its head was written."""
    file = save_sound(tmp_path / "a.wav", sound(20))
    content = file.read_bytes()
    place = content.index(b"data") + 4
    file.write_bytes(content[:place] + b"\xff" * 4 + content[place + 4 :])
    assert len(read_sound(file)[0]) == 20


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: b"ID3" + content, "not a WAV file (it begins with b'ID3R'); convert it, as by: ffmpeg"),
        (lambda content: content[:-2], "cut off, 38 of 40 bytes of its chunk b'data' are there"),
        (lambda content: content[:36], "damaged, it lacks a description of its samples or the samples themselves"),
        (lambda content: content.replace(MONO, struct.pack("<HH", 7, 1), 1), "have the format 7 of 16 bits"),
        (lambda content: content.replace(MONO, struct.pack("<HH", 1, 0), 1), "has 0 channels"),
        (lambda content: content.replace(MONO, struct.pack("<HH", 1, 3), 1), "for 3 channels"),
        (lambda content: content[: -len(b"####") - 40] + bytes(4), "has 0 samples"),
    ],
)  # fmt: skip
def test_what_is_not_a_sound(spoil: object, said: str, tmp_path: Path) -> None:
    file = save_sound(tmp_path / "a.wav", sound(20))
    assert file.read_bytes() != spoil(file.read_bytes())
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(OptionError) as error:
        read_sound(file)
    assert str(error.value).startswith(f"{file}: ")
    assert said in str(error.value)


def test_samples_that_are_no_numbers(tmp_path: Path) -> None:
    file = save_sound(tmp_path / "a.wav", np.full((9, 1), np.nan), bits=32, code=3)
    with pytest.raises(OptionError, match="samples that are NaN or infinite"):
        read_sound(file)


def test_what_some_programs_append(tmp_path: Path) -> None:
    file = save_sound(tmp_path / "a.wav", sound(20))
    file.write_bytes(file.read_bytes() + b"ID3 \x09\x09\x00\x00and less than announced")
    assert len(read_sound(file)[0]) == 20


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read as a sound"):
        read_sound(tmp_path / "a.wav")
