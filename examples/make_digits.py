"""Write scikit-learn's handwritten digits as PNG files, a folder for each class.

    python examples/make_digits.py build/digits

The last 297 of the 1797 images, as `build/digits/0/0007.png`: the name is the index among all.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write(out: Path, count: int) -> None:
    """Write the last `count` digits to `out`."""
    digits = load_digits()
    for index in range(len(digits.target) - count, len(digits.target)):
        file = out / str(digits.target[index]) / f"{index:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(digits.images[index] * 255 / 16).astype(np.uint8)).save(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as PNG files.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=297, help="how many, from the end of the data set")
    arguments = parser.parse_args()
    write(arguments.out, arguments.count)
    print(f"digits: {arguments.out}")
