"""Looking up adapters by the names in requests."""

import os
from pathlib import Path

import pytest

from converters.errors import OptionError
from peanut_serve.variants.roots import AdapterRoots


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("gsm8k", "style.v2", ".hidden", "a b"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "adapter_model.safetensors").touch()
    (tmp_path / "root" / "empty").mkdir()
    (tmp_path / "root" / "flowers.bin").touch()
    (tmp_path / "root" / "notes.txt").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "theta.bin").touch()
    return tmp_path / "root"


def test_folders_and_files(root: Path) -> None:
    roots = AdapterRoots([root, "org/style"])
    assert roots.names() == ["flowers", "gsm8k", "style.v2", "org/style"]
    assert roots.find("gsm8k").spec == root / "gsm8k"
    assert roots.find("flowers").spec == root / "flowers.bin"
    assert roots.find("org/style").spec == "org/style"


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc", "..", ".", "", ".hidden", "a b", "gsm8k/", "gsm8k/.", "gsm8k\0", "gsm8k\n", "empty",
     "x" * 129, "notes", "notes.txt", "org/other", "flowers.bin", "~", "..%2foutside"],
)  # fmt: skip
def test_names_that_are_not_adapters(root: Path, name: str) -> None:
    assert AdapterRoots([root, "org/style"]).find(name) is None


def test_a_name_in_two_folders(root: Path, tmp_path: Path) -> None:
    (tmp_path / "second" / "gsm8k").mkdir(parents=True)
    (tmp_path / "second" / "gsm8k" / "theta.bin").touch()
    with pytest.raises(OptionError, match="there are two adapters gsm8k: .*; rename one of them"):
        AdapterRoots([root, tmp_path / "second"]).find("gsm8k")


def test_an_invalid_root(tmp_path: Path) -> None:
    for wrong in (tmp_path / "missing", "gsm8k", "a/b/c"):
        with pytest.raises(OptionError, match="neither a folder of adapters nor a Hub id"):
            AdapterRoots([wrong])


def test_the_state_changes_with_the_files(root: Path) -> None:
    source = AdapterRoots([root]).find("gsm8k")
    weights = root / "gsm8k" / "adapter_model.safetensors"
    states = [source.state()]
    weights.write_bytes(b"1")
    states.append(source.state())
    before = weights.stat()
    weights.write_bytes(b"2")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # a copy that preserves the mtime
    states.append(source.state())
    (root / "gsm8k" / "adapter_config.json").touch()
    states.append(source.state())
    weights.unlink()
    (root / "gsm8k" / "adapter_config.json").unlink()
    (root / "gsm8k").rmdir()
    states.append(source.state())
    assert len(set(states)) == 5
    assert states[-1] == ()
