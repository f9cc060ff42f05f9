"""`peanut-serve state`: its output and its exit codes."""

import json
import shutil
from pathlib import Path

import pytest
from support.commands import Run
from support.server.catalogue_site import Site
from support.tiny_models import Pair

from peanut_serve.settings.server import state_of


def test_a_state_moves(pair: Pair, tmp_path: Path, run_here: Run) -> None:
    site = Site(pair, tmp_path)
    digest, archive, new = site.digest(), tmp_path / "state.tar", tmp_path / "new"
    done = run_here("peanut-serve", "state", "export", "--state", site.state, "-o", archive)
    assert done.stdout.startswith(f"wrote {archive}: 1 version, "), done.stderr
    done = run_here("peanut-serve", "state", "check", archive)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "the state is whole")
    kept = json.loads((site.state / "variants.json").read_text())["base"]
    assert f", base {kept.split(':')[1][:12]}\n" in done.stdout
    done = run_here("peanut-serve", "state", "import", archive, "--state", site.state, "--replace")
    assert (done.returncode, "another server uses" in done.stderr) == (1, True)
    done = run_here("peanut-serve", "state", "import", archive, "--state", new)
    assert f"imported 1 version into {new}" in done.stdout
    check = ("peanut-serve", "state", "check", "--state", new, "--base", pair.base)
    done = run_here(*check, "--adapters", site.tasks)
    assert (done.returncode, f"v1: {digest[:12]}" in done.stdout) == (0, True)
    (new / "theta" / digest / "adapter_model.safetensors").write_bytes(b"")
    done = run_here(*check)
    assert (done.returncode, f"problem: version {digest[:12]} cannot be opened" in done.stderr) == (1, True)
    found = json.loads(run_here(*check, "--json").stdout)
    assert (found["usable"], list(found["versions"])) == ([], ["v1"])


def test_where_the_state_is(pair: Pair, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(pair, tmp_path)
    site.digest()
    done = run_here("peanut-serve", "state", "check")
    assert done.stderr == "peanut-serve state: give --state, or the --base of a server without --state\n"
    monkeypatch.setenv("PEANUT_STATE", str(site.state))
    assert run_here("peanut-serve", "state", "check").returncode == 0
    monkeypatch.delenv("PEANUT_STATE")
    default = state_of(str(pair.base))
    shutil.copytree(site.state, default, dirs_exist_ok=True)
    try:
        assert run_here("peanut-serve", "state", "check", "--base", pair.base).returncode == 0
    finally:
        shutil.rmtree(default)
    done = run_here("peanut-serve", "state", "check", "--base", pair.base)
    assert (done.returncode, "has no variants.json; check --state" in done.stderr) == (1, True)
