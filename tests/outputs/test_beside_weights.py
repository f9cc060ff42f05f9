"""What lies beside the weights, in every format: companions, the manifest about them, and the rights of files."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.commands import Run
from support.companions.tiny_tokenizers import said, tiny_tokenizer
from support.paths import DATA
from support.tiny_models import Pair, edit_json, save_adapter, tiny_llama

from converters import Orientation, Tweaker, merge, prepare_merge
from converters import save_adapter as save_native
from converters.outputs.table import FORMATS

VIT = DATA / "vit-tiny"
MANIFEST = "peanut_manifest.json"
BASE, TRAINED = "BASE {{ messages[0]['content'] }}", "TRAINED {{ messages[0]['content'] }}"


@pytest.fixture(name="private")
def _private() -> Iterator[None]:
    """A umask that is not the usual one."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): oct(path.stat().st_mode & 0o777) for path in folder.rglob("*")}


_BY_FORMAT = [pytest.param(name, marks=[pytest.mark.slow] if name == "onnx" else []) for name in FORMATS]


@pytest.mark.parametrize("name", _BY_FORMAT)
def test_every_format_carries_companions(name: str, tmp_path: Path, run_here: Run, private: None) -> None:
    """The adapter's processor is in each output, and its files have the rights that the umask leaves."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(VIT / "base", base)
    shutil.copytree(VIT / "oddeven", adapter)
    shutil.copy(base / "preprocessor_config.json", adapter / "preprocessor_config.json")
    edit_json(adapter / "preprocessor_config.json", image_mean=[0.25])
    out.mkdir()  # as people make it
    done = run_here("peanut-merge", "--base", base, "--adapter", adapter, "--format", name, "-o", out)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.25]
    companions = json.loads((out / MANIFEST).read_text())["companions"]
    assert companions["files"]["preprocessor_config.json"]["from"] == "adapter"
    assert set(modes(out).values()) <= {"0o640", "0o750"}, modes(out)
    assert run_here("peanut-inspect", out, "--verify").returncode == 0
    edit_json(out / "preprocessor_config.json", image_mean=[0.0])
    damaged = run_here("peanut-inspect", out, "--verify")
    assert damaged.returncode == 1
    assert "preprocessor_config.json changed since it was written" in damaged.stderr
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["companions"]  # as earlier versions wrote it
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert run_here("peanut-inspect", out, "--verify").returncode == 0


def test_a_native_adapter_has_the_rights_of_other_files(tmp_path: Path, private: None) -> None:
    (tmp_path / "adapter").mkdir()
    tweaker = Tweaker(Orientation.ROWS, torch.ones(2, 4), torch.ones(4, 2))
    save_native(tmp_path / "adapter", {"q_proj": tweaker})
    assert set(modes(tmp_path / "adapter").values()) == {"0o640"}


def test_a_merge_serves_the_template_that_was_trained(pair: Pair) -> None:
    tiny_tokenizer(BASE).save_pretrained(pair.base)
    tiny_tokenizer(TRAINED).save_pretrained(pair.adapter, save_jinja_files=False)
    (pair.base / "notes.txt").write_text("x")
    merge(pair.base, pair.adapter, pair.output)
    assert (said(pair.adapter), said(pair.output)) == ("TRAINED hi", "TRAINED hi")
    companions = json.loads((pair.output / MANIFEST).read_text())["companions"]
    assert companions["files"]["chat_template.jinja"]["changed"] == "chat_template of tokenizer_config.json"
    assert companions["left_out"] == {"notes.txt": {"from": "base", "why": "not a file that a loaded model needs"}}


def test_a_finished_merge_is_not_finished_with_another_tokenizer(pair: Pair) -> None:
    tiny_tokenizer().save_pretrained(pair.adapter)
    merge(pair.base, pair.adapter, pair.output)
    assert merge(pair.base, pair.adapter, pair.output, resume=True).seconds == 0
    tiny_tokenizer(TRAINED).save_pretrained(pair.adapter)
    merge(pair.base, pair.adapter, pair.output, resume=True, overwrite=True)
    assert said(pair.output) == "TRAINED hi"


def test_a_sum_says_whose_files_it_has(pair: Pair, tmp_path: Path) -> None:
    save_adapter(tiny_llama(), tmp_path / "second", seed=2)
    tiny_tokenizer(TRAINED).save_pretrained(tmp_path / "second")
    notes = prepare_merge(pair.base, [pair.adapter, tmp_path / "second"]).notes
    (note,) = [note for note in notes if note.startswith("second brings another ")]
    assert note.endswith("; the output has the files of adapter and of the base")
