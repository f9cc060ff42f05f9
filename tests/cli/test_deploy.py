"""`peanut-serve deploy` without a cluster: what is written, and what is refused before."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from support.commands import Run
from support.paths import ROOT
from support.server.tenants import entry, write_keys
from support.tiny_models import Pair

from converters.errors import MissingDependencyError
from peanut_serve.ray.declaration import declaration
from peanut_serve.ray.one_machine import VARIABLES, serve_here
from peanut_serve.ray.settings import EngineSettings, FleetSettings


@pytest.fixture
def here(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `base`, `tasks` and `keys`, which the command runs in."""
    shutil.copytree(pair.adapter, tmp_path / "tasks" / "gsm8k")
    (tmp_path / "keys").write_text("a-key\n")
    (tmp_path / "admin").write_text("an-admin-key\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    return tmp_path


def deploy(run_here: Run, *options: str) -> tuple[int, str]:
    done = run_here("peanut-serve", "deploy", "--base", "base", "--adapters", "tasks", *options)
    return done.returncode, done.stderr


def written(here: Path) -> dict[str, object]:
    return yaml.safe_load((here / "fleet.yaml").read_text())


def test_what_is_written(here: Path, run_here: Run) -> None:
    options = ["--mode", "merged", "--replicas", "4", "--gpus-per-replica", "1", "--api-key-file", "keys"]
    own = ["--max-waiting", "99", "--state", "state", "--admin-key-file", "admin"]
    code, error = deploy(run_here, *options, "--host-cache", "4GiB", "--max-model-len", "64", *own)
    assert (code, error) == (0, "")
    sources = ["--base", str(here / "base"), "--adapters", str(here / "tasks"), "--mode", "merged"]
    given = ["--host-cache", "4GiB", "--max-model-len", "64"]
    files = {"key_file": "keys", "admin_key_file": "admin", "state": "state"}
    args = {"gpus": 1.0} | {name: str(here / file) for name, file in files.items()}
    assert written(here) == {
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "peanut-serve",
                "route_prefix": "/",
                "import_path": "peanut_serve.ray.app:build",
                "args": {"engine": {"options": [*sources, *given]}, **args},
                "deployments": [
                    {"name": "Engine", "num_replicas": 4, "max_queued_requests": 99},
                    {"name": "Front", "user_config": {"most_waiting": 99}},
                ],
            }
        ],
    }
    FleetSettings.model_validate(written(here)["applications"][0]["args"])  # type: ignore[index]
    assert sys.executable not in (here / "fleet.yaml").read_text(), "nodes have their own"


@pytest.mark.parametrize(
    ("options", "slots"),
    [([], 1), (["--max-loras", "5"], 5), (["--max_loras=6"], 6), (["--mode", "auto", "--max-loras", "5"], 1)],
)
def test_slots_are_those_of_lora(here: Path, run_here: Run, options: list[str], slots: int) -> None:
    assert deploy(run_here, *options)[0] == 0
    args = written(here)["applications"][0]["args"]  # type: ignore[index]
    assert FleetSettings.model_validate(args).engine.slots == slots


@pytest.mark.parametrize(
    ("options", "binding"),
    [(["--replicas", "2"], "nobind"), ([], None), (["--replicas", "2", "--gpus-per-replica", "1"], None)],
)
def test_engines_on_cpus_do_not_bind_the_same_cores(
    here: Path, run_here: Run, options: list[str], binding: str | None
) -> None:
    assert deploy(run_here, *options)[0] == 0
    engine = FleetSettings.model_validate(written(here)["applications"][0]["args"]).engine  # type: ignore[index]
    assert engine.variables.get("VLLM_CPU_OMP_THREADS_BIND") == binding


def test_a_binding_of_the_user_is_kept(here: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3|4-7")
    assert deploy(run_here, "--replicas", "2")[0] == 0
    assert "VLLM_CPU_OMP_THREADS_BIND: 0-3|4-7" in (here / "fleet.yaml").read_text()


def test_files_are_named_by_absolute_paths(here: Path, run_here: Run) -> None:
    (here / "engine.yaml").write_text("vllm: {max-model-len: 64}\n")
    assert deploy(run_here, "--config=engine.yaml", "--chat-template", "keys")[0] == 0
    text = (here / "fleet.yaml").read_text()
    assert f"- --config={here}/engine.yaml\n" in text
    assert f"- {here}/keys\n" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "missing-base/x/y"], "there is no folder missing-base/x/y"),
        (["--adapters", "missing/tasks/x"], "missing/tasks/x"),
        (["--mode", "merged", "-dp", "2"], "-dp cannot be used with --mode merged"),
        (["--host-cache", "much", "--mode", "merged"], "'much' is not a valid size"),
        (["--max-loras", "many"], "--max-loras is many; expected a positive number"),
        (["--api_key", "SECRET"], "--api-key cannot be used with deploy: give the keys of clients as --api-key-file"),
        (["--check"], "--check cannot be used with deploy: run peanut-serve --check with the options"),
        (["--admin-port=1"], "--admin-port cannot be used with deploy: each replica has its own"),
        (["--config", "secret.yaml"], "a key does not belong in a configuration"),
        (["--config", "keyed.yaml"], "--api-key-file cannot be used with deploy: give it to deploy, not in"),
        (["--config", "audited.yaml"], "--audit-log cannot be used with deploy: give it to deploy, not in"),
        (["--config", "teams.yaml"], "--keys cannot be used with deploy: give it to deploy, not in"),
        (["--keys", "empty"], "expected a list under keys:"),
        (["--keys", "none"], "/none cannot be read: No such file"),
        (["--config", "tls.yaml"], "--ssl-keyfile cannot be used with deploy"),
        (["--api-key-file", "missing"], "missing cannot be read"),
        (["--api-key-file", "keys", "--admin-key-file", "keys"], "is also in"),
        (["--admin-key-file", "empty"], "there is no key in"),
        (["--api-key-file", "empty"], "there is no key in"),
        (["--audit-log", "changes"], "--audit-log is for the admin API, which is off; give --admin-key-file too"),
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 can be reached by others; give --api-key-file or --keys, or serve on 127.0.0.1",
        ),
        (["--host", "0.0.0.0", "--local"], "--host 0.0.0.0 can be reached by others; give --api-key-file"),
        (["--gpus-per-replica", "1.5"], "--gpus-per-replica is 1.5; expected a whole number"),
        (["-o", "keys"], "keys exists; give another --output, or --overwrite"),
    ],
)
def test_refusals(here: Path, run_here: Run, options: list[str], message: str) -> None:
    (here / "secret.yaml").write_text("vllm: {api_key: SECRET}\n")
    (here / "keyed.yaml").write_text("api-key-file: keys\n")
    (here / "audited.yaml").write_text("audit-log: changes\n")
    (here / "teams.yaml").write_text("keys: teams\n")
    (here / "tls.yaml").write_text("vllm: {ssl-keyfile: keys}\n")
    (here / "empty").write_text("\n")
    code, error = deploy(run_here, *options)
    assert code == 1
    assert message in error
    assert [line.startswith("peanut-serve deploy: ") for line in error.splitlines()][-1:] == [True]
    assert not (here / "fleet.yaml").exists()


def test_teams_are_known_to_the_front_alone(here: Path, run_here: Run) -> None:
    write_keys(here / "teams.json", entry("team"), entry("boss", role="admin"))
    code, error = deploy(run_here, "--keys", "teams.json")
    assert (code, "without --api-key-file" in error) == (0, False)
    assert written(here)["http_options"]["host"] == "0.0.0.0"  # type: ignore[index]
    settings = FleetSettings.model_validate(written(here)["applications"][0]["args"])  # type: ignore[index]
    assert (settings.keys, settings.has_admin) == (here / "teams.json", True)
    assert not any("teams.json" in option for option in settings.engine.options)


def test_options_of_the_admin_api_in_the_environment_do_not_count(
    here: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEANUT_AUDIT_LOG", "log")
    monkeypatch.setenv("PEANUT_ADMIN_HOST", "0.0.0.0")
    assert deploy(run_here)[0] == 0


def test_an_open_fleet_is_noted(here: Path, run_here: Run) -> None:
    assert "note: without --api-key-file" in deploy(run_here)[1]
    assert written(here)["http_options"]["host"] == "127.0.0.1"  # type: ignore[index]


def test_a_mistake_in_an_option_of_an_engine(here: Path, run_here: Run) -> None:
    code, error = deploy(run_here, "--max-wait", "soon")
    assert code == 2
    assert "Invalid value for '--max-wait'" in error


def test_the_example_is_one_that_the_command_could_write() -> None:
    example = yaml.safe_load((ROOT / "examples" / "fleet" / "fleet.yaml").read_text())
    application = example["applications"][0]
    deployed = application["deployments"][0]
    settings = FleetSettings.model_validate(
        {**application["args"], "replicas": deployed["num_replicas"], "most_waiting": deployed["max_queued_requests"]}
    )
    assert declaration(settings, **example["http_options"]) == example


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'peanut-serve\[ray\]'"):
        serve_here(FleetSettings(engine=EngineSettings(options=())), "127.0.0.1", 1)
