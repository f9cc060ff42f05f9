"""Options from a file and from the environment."""

import os
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer.main
import yaml
from support.commands import Run
from support.project.documents import Document, rows
from support.tiny_models import Pair

from converters.errors import OptionError
from peanut_serve.cli import configuration, serve
from peanut_serve.cli.configuration import settable, variable_of
from peanut_serve.cli.main import _command, _read_options, _serve
from peanut_serve.settings import environment
from peanut_serve.settings.serving import ServeOptions


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *arguments: str) -> ServeOptions:
    """What is served with a file, and these arguments beside it."""
    Path("peanut.yaml").write_text(text)
    return _read_options(["--config", "peanut.yaml", *arguments])


def options() -> dict[str, Any]:
    return settable(typer.main.get_command(_command()))


BOTH = "base: ./model\nadapters: [./tasks, org/style]\n"


def test_every_option_has_its_name(here: Path) -> None:
    """Each option may be in the file, under its own name, and arrives."""
    samples = {"mode": "auto", "drain": "abort", "base-copy": "disk", "prefix-cache": "salted", "log-format": "json"}
    kinds = {name: str(hint) for name, hint in get_type_hints(_serve).items()}
    values: dict[str, object] = {}
    for name, option in options().items():
        kind = kinds[str(option.name)]
        values[name] = samples.get(name, 7 if "int" in kind else 2.5 if "float" in kind else f"of-{name}")
        if option.is_flag:
            values[name] = True
        if option.multiple:
            values[name] = [f"{name}-1", f"{name}-2"]
    found = read(yaml.safe_dump(values))
    arrived = {**vars(found), **found.serving}
    for name, value in values.items():
        key = name.replace("-", "_")
        got = arrived[key if key in arrived else f"{key}s"]
        assert (list(got) if isinstance(got, tuple) else str(got) if isinstance(got, Path) else got) == value, name


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{BOTH}mode: merged\nmax-queue: 5\nmin_dwell: 2\npin: a\n"
    found = read(text)
    assert (found.base, found.adapters, found.mode) == ("./model", ("./tasks", "org/style"), "merged")
    assert (found.serving["max_queue"], found.serving["min_dwell"], found.serving["pin"]) == (5, 2.0, ["a"])
    for name, value in {
        "MODE": "auto",
        "MAX_QUEUE": "6",
        "ADAPTERS": "./x:org/y",
        "ALLOW_UNTESTED_VLLM": "1",
    }.items():
        monkeypatch.setenv(f"PEANUT_{name}", value)
    monkeypatch.setenv("PEANUT_PIN", "")  # as if it was not set
    found = read(text)
    assert (found.mode, found.serving["max_queue"], found.adapters) == ("auto", 6, ("./x", "org/y"))
    assert found.allow_untested_vllm
    assert found.serving["pin"] == ["a"]
    found = read(text, "--mode", "lora", "--max-queue", "7", "--adapters", "./z")
    assert (found.mode, found.serving["max_queue"], found.adapters) == ("lora", 7, ("./z",))
    assert _read_options(["--base", "b"]).adapters == ("./x", "org/y")  # without a file


def test_the_options_of_vllm(here: Path) -> None:
    section = """vllm:
  max-model-len: 2048
  enable_prefix_caching: true
  enable-chunked-prefill: false
  served-model-name: [one, two]
  hf-overrides: {rope_theta: 1000}
"""
    expected = (
        "--max-model-len", "2048", "--enable-prefix-caching", "--no-enable-chunked-prefill",
        "--served-model-name", "one", "two", "--hf-overrides", '{"rope_theta": 1000}',
    )  # fmt: skip
    assert read(BOTH + section).vllm == expected
    own = ("--max-model-len=64", "--enable-chunked-prefill", "--no-enable-prefix-caching")
    found = read(BOTH + section, *own).vllm
    assert found == (*own, *expected[4:])
    assert read(f"{BOTH}vllm:\n").vllm == ()


REFUSED = {
    "hostcache: 8GiB": "has the unknown key hostcache, probably meant as host-cache; options of vLLM",
    "max-model-len: 8": "has the unknown key max-model-len; options of vLLM belong below",
    "dry-run: true": "has the unknown key dry-run",
    "config: other.yaml": "has the unknown key config",
    "max-queue: 5\nmax_queue: 6": "has max-queue twice",
    "max-queue: [1, 2]": r"max-queue is \[1, 2\]; expected one text or number",
    "max-queue: true": "max-queue is True; expected one text or number",
    "allow-untested-vllm: 1": "allow-untested-vllm is 1; expected true or false",
    "pin: [[a]]": r"pin is \['a'\]; expected one",
    "vllm: [a]": r"vllm is \['a'\]; expected its options",
    "vllm: {model: x}": "sets model below vllm: the model is --base",
    "vllm: {api_key: x}": "a key does not belong in a configuration; name its file as api-key-file",
    "vllm: {max-model-len: null}": "max-model-len is None; expected one",
    "- base": "is not a mapping",
    "": "is not a mapping",
    "base: [": "cannot be read",
    "base: !!python/object/apply:os.system [id]": "cannot be read",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(here: Path, text: str) -> None:
    with pytest.raises(OptionError, match=REFUSED[text]):
        read(text)


def test_a_file_that_is_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"--config none.yaml cannot be read"):
        _read_options(["--config", "none.yaml"])
    monkeypatch.setenv("PEANUT_ALLOW_UNTESTED_VLLM", "perhaps")
    with pytest.raises(OptionError, match="PEANUT_ALLOW_UNTESTED_VLLM is perhaps; expected 1 or 0"):
        read(BOTH)


def test_variables_that_are_misspelt(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEANUT_HOSTCACHE", "1GiB")
    monkeypatch.setenv("PEANUT_SERVE_PORT", "tcp://10.0.0.1:80")  # of a Kubernetes service
    read(BOTH)
    assert capsys.readouterr().err == "note: PEANUT_HOSTCACHE is not used; did you mean PEANUT_HOST_CACHE?\n"


def test_no_variable_has_two_meanings() -> None:
    variables = {variable_of(name) for name in options()}
    others = {configuration.PREFIX + name for name in configuration._OTHER_VARIABLES}
    assert not variables & others
    # those of `vllm serve` mean the same as the option of that name
    plugin = {value for value in vars(environment).values() if str(value).startswith(configuration.PREFIX)}
    assert plugin - others == {
        "PEANUT_ADAPTERS", "PEANUT_CACHE", "PEANUT_CACHE_SIZE", "PEANUT_STATE", "PEANUT_ALLOW_UNTESTED_VLLM",
    }  # fmt: skip
    assert plugin - others <= variables


def test_the_options_of_classify_are_configured_alike(
    tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their own names; the folders as well."""
    monkeypatch.chdir(tmp_path)
    Path("classify.yaml").write_text("folders: [empty]\nmax-batch: 4\nkeys: nothing\n")
    done = run_here("peanut-serve", "classify", "--config", "classify.yaml", "--dry-run")
    assert (done.returncode, "keys file nothing cannot be read" in done.stderr) == (1, True), done.stderr
    monkeypatch.setenv("PEANUT_KEYS", "another")
    monkeypatch.setenv("PEANUT_PORT", "tcp://10.0.0.1:80")  # of a Kubernetes service
    done = run_here("peanut-serve", "classify", "--config", "classify.yaml", "--dry-run")
    assert "keys file another cannot be read" in done.stderr
    for text, told in (
        ("vllm: {max-model-len: 64}", "has a section vllm, but peanut-serve classify starts no vLLM; remove it"),
        ("api-key: secret", "has the unknown key api-key, probably meant as api-key-file"),
        ("max-batsch: 4", "probably meant as max-batch"),
        ("folders: [empty]\nmax-batch: many", "Invalid value for '--max-batch'"),
    ):
        Path("classify.yaml").write_text(f"{text}\n")
        done = run_here("peanut-serve", "classify", "--config", "classify.yaml", "--dry-run")
        assert (done.returncode > 0, told in done.stderr, "secret" in done.stderr) == (True, True, False), done.stderr
    from typer.main import get_command

    from peanut_serve.cli import classify_command

    for option in get_command(classify_command._command()).params:
        flags = [flag for flag in option.opts if flag.startswith("--")]
        assert not flags or f"--{str(option.name).replace('_', '-')}" in flags, "its name in a file is another one"


def test_every_option_stands_in_the_guide() -> None:
    table = rows(Document("peanut_serve/OPERATIONS.md").section("Options"))
    listed = {cells[0].strip("`"): cells[1].strip("`") for cells in table}
    assert listed == {f"--{name}": variable_of(name) for name in options()}


def test_keys_from_files(pair: Pair, here: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are in no output, and given once."""
    shutil.copytree(pair.adapter, here / "tasks" / "gsm8k")
    (here / "clients").write_text("one-key\ntwo-key\n")
    (here / "admin").write_text("an-admin-key\n")
    (here / "peanut.yaml").write_text("base: base\nadapters: tasks\napi-key-file: clients\nadmin-key-file: admin\n")
    command = ("peanut-serve", "--config", "peanut.yaml", "--dry-run")
    done = run_here(*command)
    assert (done.returncode, "variants: gsm8k" in done.stdout) == (0, True), done.stderr
    assert "-key" not in done.stdout + done.stderr
    wrong = {
        "--api-key x": "give them once",
        "--admin-key-file clients": "clients has 2 keys; expected one",
        "--api-key-file admin": "is also one of clients",
        "--api-key-file none": "the keys in none cannot be read",
    }
    for arguments, message in wrong.items():
        done = run_here(*command, *arguments.split())
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
        assert "two-key" not in done.stderr
    monkeypatch.setenv("PEANUT_ADMIN_KEY", "another")
    assert "the admin key is in admin and in PEANUT_ADMIN_KEY; give it once" in run_here(*command).stderr


def test_where_the_keys_go(pair: Pair, here: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """To vLLM as options that no other process sees, and to the admin API by the environment that it reads."""
    shutil.copytree(pair.adapter, here / "tasks" / "gsm8k")
    (here / "clients").write_text("one-key\ntwo-key\n")
    (here / "admin").write_text("an-admin-key\n")
    started: list[tuple[list[str], str | None]] = []

    def start(arguments: list[str]) -> None:
        started.append((arguments, os.environ.get("PEANUT_ADMIN_KEY")))

    monkeypatch.setattr(serve, "run_vllm", start)
    monkeypatch.setattr(serve, "check_endpoints", lambda allow_untested: None)  # no vLLM is imported
    command = ["peanut-serve", "--base", "base", "--adapters", "tasks", "--state", "state"]
    done = run_here(*command, "--api-key-file", "clients", "--admin-key-file", "admin")
    assert done.returncode == 0, done.stderr
    assert run_here(*command).returncode == 0
    (keyed, admin_key), (open_to_all, none) = started
    assert keyed == [*open_to_all, "--api-key", "one-key", "two-key"]
    assert (admin_key, none) == ("an-admin-key", None)
