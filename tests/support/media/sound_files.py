"""WAV files for the tests, written byte by byte, and folders of feature extractors."""

import struct
from pathlib import Path

import numpy as np


def sound(samples: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Noise between -0.5 and 0.5, (samples, channels), so that a sample out of its place is seen."""
    return np.random.default_rng(seed).random((samples, channels)) - 0.5


def save_sound(
    file: Path, samples: np.ndarray, rate: int = 16000, bits: int = 16, code: int = 1, extensible: bool = False
) -> Path:
    """Write samples (count, channels) as integers (`code` 1) or floats (3), with a chunk before the data."""
    channels, width = samples.shape[1], bits // 8
    form = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * channels * width, channels * width, bits
    )
    if extensible:
        form += struct.pack("<HHIH14x", 22, bits, 0, code)
    chunks = [(b"fmt ", form), (b"LIST", b"odd"), (b"data", encoded(samples, bits, code))]
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body)
    return file


def encoded(samples: np.ndarray, bits: int, code: int) -> bytes:
    if code == 3:
        return samples.astype(f"<f{bits // 8}").tobytes()
    whole = np.round(samples * 2 ** (bits - 1)).astype("<i8")
    if bits == 8:
        return (whole + 128).astype(np.uint8).tobytes()
    return whole.reshape(-1, 1).view(np.uint8)[:, : bits // 8].tobytes()
