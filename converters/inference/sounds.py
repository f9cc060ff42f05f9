"""Reading WAV files into samples: integers and floats, of which the standard library's `wave` knows the former."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.errors import OptionError

SOUND_SUFFIXES = (".wav", ".wave")
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # formats: the last one names another, 24 bytes into its description
_OPEN_END = 0xFFFFFFFF  # the length of a chunk that was written to a pipe
_CURE = "convert it, as by: ffmpeg -i INPUT -ac 1 -ar RATE -c:a pcm_s16le OUTPUT.wav"


class _Format(NamedTuple):
    code: int
    channels: int
    rate: int
    bits: int


def read_sound(source: Path | bytes) -> tuple[NDArray[np.float32], int]:
    """Read a WAV file, or its content: samples between -1 and 1, float32, the mean of channels; samples per second.

    Raises `OptionError` if the file is missing, damaged, empty or not WAV, or if its samples are neither integers of
    8 to 32 bits nor floats.
    """
    file = sound_name(source)
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise OptionError(f"{file}: cannot be read as a sound ({error.strerror}); expected a WAV file") from None
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise OptionError(f"{file}: not a WAV file (it begins with {content[:4]!r}); {_CURE}")
    chunks = dict(_chunks(content, file))
    if not {b"fmt ", b"data"} <= chunks.keys() or len(chunks[b"fmt "]) < 16:
        raise OptionError(f"{file}: damaged, it lacks a description of its samples or the samples themselves")
    form = _format(chunks[b"fmt "])
    if form.rate < 1 or form.channels < 1:
        raise OptionError(f"{file}: damaged, it has {form.channels} channels of {form.rate} samples per second")
    samples = _samples(chunks[b"data"], form, file)
    if samples.size == 0 or samples.size % form.channels:
        raise OptionError(f"{file}: has {samples.size} samples for {form.channels} channels, expected some for each")
    if not np.isfinite(samples).all():
        raise OptionError(f"{file}: has samples that are NaN or infinite, expected numbers between -1 and 1")
    return samples.reshape(-1, form.channels).mean(axis=1, dtype=np.float64).astype(np.float32), form.rate


def sound_name(source: Path | bytes) -> str:
    """What messages call a sound: its path, or how much was sent."""
    return f"what was sent ({len(source)} bytes)" if isinstance(source, bytes) else str(source)


def _chunks(content: bytes, file: str) -> Iterator[tuple[bytes, bytes]]:
    """The name and content of every chunk, each of which begins at an even place."""
    place = 12
    while place + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, place)
        place += 8
        if name == b"data" and length == _OPEN_END:
            length = len(content) - place
        if place + length > len(content):
            if name not in (b"fmt ", b"data"):
                return  # what some programs append
            found = len(content) - place
            raise OptionError(f"{file}: cut off, {found} of {length} bytes of its chunk {name!r} are there")
        yield name, content[place : place + length]
        place += length + length % 2


def _format(chunk: bytes) -> _Format:
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if code == _EXTENSIBLE and len(chunk) >= 26:
        (code,) = struct.unpack_from("<H", chunk, 24)
    return _Format(code, channels, rate, bits)


def _samples(data: bytes, form: _Format, file: str) -> NDArray[np.float64]:
    """All samples, of all channels, between -1 and 1."""
    width = form.bits // 8
    if width and len(data) % width:
        raise OptionError(f"{file}: damaged, {len(data)} bytes are no whole number of samples of {width} bytes")
    if form.code == _FLOAT and form.bits in (32, 64):
        return np.frombuffer(data, f"<f{width}").astype(np.float64)
    if form.code == _PCM and form.bits == 8:
        return (np.frombuffer(data, np.uint8) - 128.0) / 128  # the only one without a sign
    if form.code == _PCM and form.bits in (16, 24, 32):
        wide = np.zeros((len(data) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
        return wide.view("<i4")[:, 0] / 2.0**31
    raise OptionError(
        f"{file}: its samples have the format {form.code} of {form.bits} bits; expected integers (1) of 8, 16, 24 or "
        f"32 bits or floats (3) of 32 or 64; {_CURE}"
    )
