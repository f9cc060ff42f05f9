"""Every command of the guide to operations runs, in its order and with its own configuration."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.commands import Run
from support.project.documents import OPERATIONS, SERVING, rows
from support.server.admin import KEY, FakeControl, serving_app
from support.server.releases import FakeReleases

from converters import open_checkpoint
from peanut_serve.cli import classify_command, deploy_command, fleet_options, key_command, size_command
from peanut_serve.cli.ctl import command as ctl_command
from peanut_serve.cli.ctl import release
from peanut_serve.releases.routes import add_releases
from peanut_serve.variants.state_folder import Record, Records, VariantStore
from peanut_serve.web.admin import admin_app

pytestmark = pytest.mark.slow


def commands() -> list[str]:
    """All of them, repeated ones as well."""
    return [command for command in OPERATIONS.inline if re.match(r"peanut-\S+ ", command)]


@pytest.fixture
def here(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of the documents, the configuration of the guide, and a state with one name."""
    shutil.copytree(folders / "gsm8k", folders / "tasks" / "gsm8k")
    (block,) = OPERATIONS.blocks("yaml")
    (folders / "peanut.yaml").write_text(block)
    store = VariantStore(folders / "state")
    base = open_checkpoint(folders / "llama2-7b").fingerprint
    store.save(Records(base=base, variants={"gsm8k": Record(source="gsm8k")}))
    store.close()
    monkeypatch.setenv("PEANUT_ADMIN_KEY", KEY)
    return folders


def test_the_commands(here: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands()
    assert len(found) >= 25
    control = FakeControl()
    control.names += ["gsm8k", "math"]
    app = admin_app(control, KEY)
    add_releases(app, FakeReleases())
    with serving_app(app) as url:
        monkeypatch.setenv("PEANUT_ADMIN_URL", url)
        for command in found:
            done = run_here(*shlex.split(command))
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (here / "new-state" / "variants.json").exists()
    assert list((here / "state").glob("replaced-*.tar"))


def test_the_run_book_has_ten_failures() -> None:
    assert len(re.findall(r"^### ", OPERATIONS.section("Run book"), re.MULTILINE)) == 10


def test_every_metric_is_explained() -> None:
    table = {row[0].strip("`") for row in rows(OPERATIONS.section("Metrics"))}
    assert table == {row[0].strip("`") for row in rows(SERVING.section("Metrics and health"))}


def test_every_option_that_is_named_exists() -> None:
    from typer.main import get_command
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from peanut_serve.cli.main import _command
    from peanut_serve.cli.state_command import app

    parsers = [
        get_command(_command()),
        get_command(ctl_command.app),
        *get_command(app).commands.values(),
        *get_command(ctl_command.app).commands.values(),
        *get_command(release.app).commands.values(),
    ]  # type: ignore[attr-defined]
    known = {flag for parser in parsers for option in parser.params for flag in option.opts + option.secondary_opts}
    known |= {flag for action in make_arg_parser(FlexibleArgumentParser())._actions for flag in action.option_strings}
    for module in (classify_command, deploy_command, fleet_options, key_command, size_command):
        known |= set(re.findall(r'"(--[a-z-]+)"', Path(module.__file__).read_text()))
    named = {option for code in OPERATIONS.inline for option in re.findall(r"--[a-z][a-z-]*", code)}
    assert named - known == set()
