"""Outputs that exist, are being written, or cannot be: nothing is damaged, and nothing incomplete is left."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import Pair

from converters import merge
from converters.errors import NoSpaceError, OutputError, OutputExistsError
from converters.files import staging as publish


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_an_existing_folder_is_refused_and_untouched(pair: Pair) -> None:
    merge(pair.base, pair.adapter, pair.output)
    before = content(pair.output)
    with pytest.raises(OutputExistsError, match="exists; choose another output, or replace it with overwrite=True"):
        merge(pair.base, pair.adapter, pair.output)
    assert content(pair.output) == before


def test_overwrite_replaces_at_the_end_only(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(pair.base, pair.adapter, pair.output)
    (pair.output / "mine.txt").write_text("x")
    before = content(pair.output)
    with (
        pytest.raises(OutputError, match="disk on fire; no existing output was changed"),
        monkeypatch.context() as patch,
    ):
        patch.setattr("converters.outputs.checkpoint.draft.build_model_card", raise_error(OSError("disk on fire")))
        merge(pair.base, pair.adapter, pair.output, overwrite=True, dtype="bf16")
    assert content(pair.output) == before
    merge(pair.base, pair.adapter, pair.output, overwrite=True, dtype="bf16")
    assert not (pair.output / "mine.txt").exists()
    assert weights(pair.output)["lm_head.weight"].dtype is torch.bfloat16
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base", "merged"]


# only a system without renameat2 takes this path, and there is none here
def test_overwrite_where_folders_cannot_be_exchanged_in_one_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(pair.base, pair.adapter, pair.output)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    merge(pair.base, pair.adapter, pair.output, overwrite=True, dtype="bf16")
    assert weights(pair.output)["lm_head.weight"].dtype is torch.bfloat16
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base", "merged"]


def raise_error(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_removal_that_is_killed_leaves_no_half_a_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a killed run left, or of the output that is replaced."""

    class Killed(BaseException):
        pass

    unlink = os.unlink
    staging = pair.output.with_name(f".{pair.output.name}.peanut-staging")
    whole = merge(pair.base, pair.adapter, pair.output).output
    for left in range(len(content(whole))):
        removed: list[object] = []

        def killed_after(*args: Any, left: int = left, removed: list[object] = removed, **options: Any) -> None:
            if len(removed) == left:
                raise Killed
            removed.append(args)
            unlink(*args, **options)

        shutil.copytree(whole, staging)
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", killed_after)
            with pytest.raises(Killed):
                publish.empty(staging)
        assert len(content(staging)) == len(content(whole)) - left
        assert (staging / "config.json").exists() == (left == 0)
        shutil.rmtree(staging)


def test_overwrite_spares_what_the_tool_did_not_write(pair: Pair) -> None:
    pair.output.mkdir()
    (pair.output / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError, match="was not written by peanut-merge"):
        merge(pair.base, pair.adapter, pair.output, overwrite=True)
    with pytest.raises(OutputExistsError, match="contains the input"):
        merge(pair.base, pair.adapter, pair.base, overwrite=True)
    with pytest.raises(OutputExistsError, match="contains the input"):
        merge(pair.base, pair.adapter, pair.base.parent, overwrite=True)
    link = pair.base.parent / "link"
    link.symlink_to(pair.output)
    with pytest.raises(OutputExistsError, match="is not a folder"):
        merge(pair.base, pair.adapter, link, overwrite=True)
    assert (pair.output / "thesis.tex").read_text() == "years"


def test_an_empty_folder_may_be_overwritten(pair: Pair) -> None:
    pair.output.mkdir()
    merge(pair.base, pair.adapter, pair.output, overwrite=True)
    assert (pair.output / "config.json").exists()


def test_two_runs_to_one_output(pair: Pair) -> None:
    staging = pair.output.with_name(".merged.peanut-staging")
    staging.mkdir()
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    (staging / "half.safetensors").write_text("other")
    with pytest.raises(OutputExistsError, match="another run is writing this output"):
        merge(pair.base, pair.adapter, pair.output)
    assert (staging / "half.safetensors").exists()
    os.close(descriptor)  # its owner died
    merge(pair.base, pair.adapter, pair.output)
    assert not staging.exists()
    assert not (pair.output / "half.safetensors").exists()


def test_no_space_is_seen_ahead(pair: Pair) -> None:
    """A base with one more tensor of a terabyte: a sparse file, of which only the header is read."""
    size = 10**12
    file = pair.base / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header["extra.table"] = {"dtype": "I64", "shape": [size // 8], "data_offsets": [len(data), len(data) + size]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(file, 8 + len(text) + len(data) + size)
    with pytest.raises(NoSpaceError, match=r"down needs 1000.00 GB, but the disk of .* has \d+.\d\d GB free"):
        merge(pair.base, pair.adapter, pair.output / "deep" / "down")
    assert not pair.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000, 30_000, 85_000])
def test_a_write_that_fails_leaves_nothing(pair: Pair, limit: int) -> None:
    """The system lets no file grow beyond `limit` bytes: it fails in the header, or in the weights."""
    program = Path(sys.executable).parent / "peanut-merge"
    command = [program, "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "could not be written: [Errno 27] File too large" in done.stderr
    assert "no existing output was changed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base"]
