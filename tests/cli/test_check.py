"""`peanut-serve --check`: everything that is wrong, at once, without an engine."""

import shutil
from pathlib import Path

import pytest
from support.commands import Run
from support.server.catalogue_site import Site
from support.tiny_models import Pair, edit_json, save_adapter, tiny_llama

from peanut_serve.cli.checking import _audit_log
from peanut_serve.settings.server import ServerSettings

pytestmark = pytest.mark.slow  # imports vLLM, and opens every adapter


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Site:
    return Site(pair, tmp_path)


def test_a_server_that_would_start(site: Site, tmp_path: Path, run_here: Run) -> None:
    site.digest()
    site.catalogue.register("prod", "v1")
    shutil.copytree(site.state, tmp_path / "copy")
    for mode in ("lora", "merged", "auto"):
        command = ("peanut-serve", "--base", site.pair.base, "--adapters", site.tasks, "--mode", mode, "--check")
        done = run_here(*command, "--state", tmp_path / "copy", "--pin", "prod", "--max-model-len", "32")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == "checked 1 variants: no problems"
        assert "--max-model-len 32" in done.stdout


def test_everything_that_is_wrong(site: Site, tmp_path: Path, run_here: Run) -> None:
    site.digest()
    save_adapter(tiny_llama(hidden_size=64), site.tasks / "wider")
    shutil.copytree(site.pair.adapter, site.tasks / "broken")
    (site.tasks / "broken" / "adapter_model.safetensors").write_bytes(b"no")
    edit_json(site.state / "variants.json", base="f" * 40)
    command = ("peanut-serve", "--base", site.pair.base, "--adapters", site.tasks, "--check")
    done = run_here(*command, "--state", site.state, "--pin", "v2", "--max-model-len", "many", "--keys", "none")
    problems = [line for line in done.stderr.splitlines() if line.startswith("problem: ")]
    wanted = [
        "broken: ",
        "--pin v2: there is no such variant among v1, wider",
        "vLLM refuses its options: ",
        "wider: ",
        f"the keys file {Path.cwd()}/none cannot be read",
    ]
    wanted += [f"--state {site.state}: another server uses it", f"--state {site.state}: the records are those of"]
    assert [sum(problem.startswith(f"problem: {one}") for problem in problems) for one in wanted] == [1] * 7, problems
    assert (done.returncode, f"{len(problems)} problems" in done.stdout) == (1, True)


def test_the_base_is_looked_at(site: Site, run_here: Run) -> None:
    weights = site.pair.base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run_here("peanut-serve", "--base", site.pair.base, "--adapters", site.tasks, "--check")
    assert (done.returncode, "problem: --base " in done.stderr) == (1, True), done.stderr


def test_the_audit_log_is_looked_at(tmp_path: Path) -> None:
    """And nothing is created."""
    (tmp_path / "file").write_text("")
    for file, count in {"file": 0, "new/folder/log": 0, "": 1, "file/log": 1}.items():
        settings = ServerSettings(
            mode="lora", roots=(), state=tmp_path, cache=tmp_path, admin_port=9, audit_log=tmp_path / file
        )
        assert len(list(_audit_log(settings))) == count, file
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
