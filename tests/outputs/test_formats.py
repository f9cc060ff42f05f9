"""Every format of the table: planned, written, shown and verified through the same protocol."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run
from support.paths import DATA

from converters.api.options import MergeOptions, Sources
from converters.api.planning import plan_merges
from converters.cli.flags import FLAGS
from converters.cli.merge_command import HELP
from converters.errors import CheckpointError, OptionError, PeanutError, VerificationError
from converters.outputs.base import OutputRequest, Shown, WriteOptions
from converters.outputs.table import FORMATS, find_format, format_summaries
from converters.outputs.verifying import verify_output

VIT = DATA / "vit-tiny"
# with several files, where a format has them
OWN: dict[str, dict[str, Any]] = {"onnx": {"quantize": ["fp16"]}}
SHARD_SIZES = {"merged": "300KB"}


class Recorded:
    """Progress that is kept: (what, bytes it was to be, bytes it was)."""

    def __init__(self) -> None:
        self.bars: list[tuple[str, int, int]] = []
        self.seen: list[str] = []

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        self.bars.append((what, total, sum(done)))

    @contextmanager
    def steps(self) -> Iterator[Callable[[str], None]]:
        yield self.seen.append


def write(name: str, folder: Path, **options: object) -> tuple[Shown, Shown]:
    """Plan and write an output; what is shown before and after."""
    row = FORMATS[name]
    sources = Sources(VIT / "base", VIT / "oddeven")
    plans = plan_merges(sources, MergeOptions(row.dtype("auto"), SHARD_SIZES.get(name, "5GB")))
    request = OutputRequest(folder, write=WriteOptions(**options), own=OWN.get(name, {}))
    output_format, progress = row.load(), Recorded()
    planned = output_format.plan(plans, request)
    assert list(output_format.folders(planned)) == [folder]
    before = output_format.show(planned, None)
    result = output_format.write(planned, request.write, progress)
    assert all(total == done for _, total, done in progress.bars), progress.bars
    return before, output_format.show(planned, result)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    for name in FORMATS:
        write(name, folder / name)
    return {name: folder / name for name in FORMATS}


def named_files(folder: Path) -> list[str]:
    """The files that a manifest has hashes of."""
    manifest = json.loads((folder / "peanut_manifest.json").read_text())
    if "weights" in manifest:
        return [manifest["weights"]["file"]]
    if "files" in manifest:
        return list(manifest["files"])
    return sorted({entry["file"] for entry in manifest["tensors"].values()})


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_shown(name: str, tmp_path: Path) -> None:
    before, after = write(name, tmp_path / "out")
    assert before.lines[0].startswith(f"would write {tmp_path / 'out'}: ")
    assert after.lines[0].startswith(f"wrote {tmp_path / 'out'}: ")
    assert isinstance(before.facts, dict)
    assert isinstance(after.facts, dict)
    assert (before.facts["dry_run"], "dry_run" in after.facts) == (True, False)
    json.dumps([before.facts, after.facts])


@pytest.mark.parametrize("name", FORMATS)
def test_the_manifest_says_its_format(name: str, written: dict[str, Path]) -> None:
    manifest = json.loads((written[name] / "peanut_manifest.json").read_text())
    assert manifest.get("format") == (None if name == "merged" else name)
    assert FORMATS[name].load().name == name


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_written_is_verified(name: str, written: dict[str, Path], run_here: Run) -> None:
    done = run_here("peanut-inspect", written[name], "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert "as they were written" in done.stdout or "as it was written" in done.stdout
    facts = json.loads(run_here("peanut-inspect", written[name], "--verify", "--json").stdout)
    assert facts["output"] == str(written[name])
    if name != "merged":
        assert list(facts["files"]) == named_files(written[name])


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_that_is_damaged_or_missing_is_named(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    files = named_files(written[name])
    assert len(files) > (name in ("merged", "onnx"))
    for file in files:
        folder = tmp_path / file.replace("/", "-")
        shutil.copytree(written[name], folder)
        path = folder / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(VerificationError, match=f"{file}.* changed|changed .*{file}"):
            verify_output(folder, None, Recorded())
        path.write_bytes(content[:-1])
        with pytest.raises(PeanutError, match=file):
            verify_output(folder, None, Recorded())
        path.unlink()
        with pytest.raises(VerificationError, match=f"{file} is missing"):
            verify_output(folder, None, Recorded())


@pytest.mark.parametrize("name", ["lora", "peft"])
def test_an_adapter_without_its_config(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(written[name], tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(VerificationError, match=r"adapter_config.json is missing"):
        verify_output(tmp_path / "out", None, Recorded())


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "peanut_manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


@pytest.mark.parametrize("name", FORMATS)
def test_a_manifest_that_lacks_what_its_format_has(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(written[name], tmp_path / "out")
    edit_manifest(tmp_path / "out", tensors=None, weights=None, files=None)
    with pytest.raises(CheckpointError, match=r"no (tensors|files|hash of the weights) in it; it is damaged"):
        verify_output(tmp_path / "out", None, Recorded())


def test_a_format_of_a_newer_version(written: dict[str, Path], tmp_path: Path, run_here: Run) -> None:
    shutil.copytree(written["lora"], tmp_path / "out")
    edit_manifest(tmp_path / "out", format="gguf", generator="peanut-serve 9.0")
    done = run_here("peanut-inspect", tmp_path / "out", "--verify")
    assert done.returncode == 1
    assert "is in the format 'gguf', which this version does not know" in done.stderr
    assert "it knows merged, onnx, lora, peft" in done.stderr
    assert "peanut-serve 9.0 wrote it" in done.stderr


@pytest.mark.parametrize("name", FORMATS)
def test_recomputing(name: str, written: dict[str, Path], run_here: Run) -> None:
    inputs = ["--base", VIT / "base", "--adapter", VIT / "oddeven"]
    done = run_here("peanut-inspect", written[name], "--verify", "--full", *inputs)
    if name == "merged":
        assert (done.returncode, "recomputed in float64" in done.stdout) == (0, True)
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("peanut-inspect: --full recomputes merged checkpoints, and ")


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_that_exists(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(written[name], folder)
    with pytest.raises(PeanutError, match="out exists"):
        write(name, folder)
    assert verify_output(folder, None, Recorded()).lines
    write(name, folder, overwrite=True)
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        assert (folder / file).read_bytes() == (written[name] / file).read_bytes(), file


@pytest.mark.parametrize("name", FORMATS)
def test_options_of_other_formats_are_refused(name: str, run_here: Run) -> None:
    values = {"opset": ["18"], "quantize": ["int8"], "eval_data": ["x"]}
    values |= {"rank": ["8"], "max_error": ["0.1"], "runtime": ["vllm"]}
    every = frozenset().union(*(row.takes for row in FORMATS.values()))
    for option in every - FORMATS[name].takes:
        flag = FLAGS[option]
        asked = ["--format", name, flag, *values.get(option, [])]
        done = run_here("peanut-merge", "--base", VIT / "base", "--adapter", VIT / "oddeven", *asked)
        others = [other for other, row in FORMATS.items() if option in row.takes]
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{flag} is for --format {' or --format '.join(others)}, not for --format {name}" in done.stderr


def test_a_format_that_does_not_exist() -> None:
    with pytest.raises(OptionError, match=r"^format='gguf' is unknown; expected merged, onnx, lora or peft$"):
        find_format("gguf")


def test_the_help_names_every_format(run_here: Run) -> None:
    shown = " ".join(run_here("peanut-merge", "--help").stdout.split())
    assert all(f"{row.name} ({row.summary})" in format_summaries() for row in FORMATS.values())
    assert "merged (a checkpoint)" in shown
    assert HELP.split("\n")[0] in shown


@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_the_help_imports_nothing_heavy(command: str) -> None:
    code = (
        f"import sys\nfrom converters.cli import {command}_main\nsys.argv = ['peanut-{command}', '--help']\n"
        f"try:\n    {command}_main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_verifying_an_export_needs_no_onnx(written: dict[str, Path]) -> None:
    code = (
        "import sys\nfor name in ('onnx', 'onnxruntime', 'onnxscript'):\n    sys.modules[name] = None\n"
        "from converters.cli import inspect_main\ninspect_main()"
    )
    command = [sys.executable, "-c", code, written["onnx"], "--verify"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
