"""Every command and snippet of the README runs, on tiny models under the README's names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import JSON_ADAPTER, ROOT, Pair, run
from test_names import vit_with_head

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [found for found in re.findall(r"`(peanut-[^`]+)`", README) if " " in found]


@pytest.fixture
def folders(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folders the README speaks of."""
    pair.base.rename(tmp_path / "llama2-7b")
    pair.adapter.rename(tmp_path / "gsm8k")
    vit_with_head(tmp_path / "vit-base", tmp_path / "pets")
    (tmp_path / "labels.json").write_text('["abyssinian", "beagle", "sphynx"]')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(folders: Path) -> None:
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        done = run(*shlex.split(command))
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (folders / "llama2-7b-gsm8k" / "config.json").exists()
    assert (folders / "vit-base-pets" / "config.json").exists()
    assert (folders / "small" / "config.json").exists()
    assert not (folders / "planned").exists()


def test_the_snippets(folders: Path) -> None:
    snippets = [text for language, text in BLOCKS if language == "python"]
    assert snippets
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folders / "merged" / "config.json").exists()


def test_the_make_targets_exist() -> None:
    """`make demo` and `make test` are run whole by .ci/run."""
    targets = [line.split() for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert targets == [["make", "demo"], ["make", "test"]]
    ci = (ROOT / ".ci" / "run").read_text()
    for _, target in targets:
        assert f"make {target}" in ci
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, env={**os.environ, "MAKEFLAGS": ""}
        )
        assert done.returncode == 0


def test_the_demo_shows_what_the_readme_says(smollm2: Path, tmp_path: Path) -> None:
    assert (
        run("peanut-merge", "--base", smollm2, "--adapter", JSON_ADAPTER, "-o", tmp_path / "merged").returncode == 0
    )
    script = ROOT / "examples" / "side_by_side.py"
    environment = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run(
        [sys.executable, script, smollm2, tmp_path / "merged"], capture_output=True, text=True, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    assert '{"answer": "Rome"}' in shown.stdout
    assert '{"answer": "green"}' in shown.stdout
    assert "Il Coriobella, Italy." in shown.stdout
