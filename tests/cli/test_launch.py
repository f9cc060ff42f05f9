"""The command line and environment with which `peanut-serve` starts vLLM."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LNTuningConfig
from support.commands import Run, run
from support.hub.server import hub_settings, serve_hub
from support.peft_methods import train
from support.tiny_models import Pair, save_adapter, tiny_llama
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from converters import Adapter, merge, open_checkpoint
from converters.errors import AdapterError, OptionError
from peanut_serve.cli.finding import Found, find_adapters
from peanut_serve.cli.launch import base_names, server_variables, vllm_options
from peanut_serve.settings.server import ServerSettings, server_settings
from peanut_serve.variants.roots import AdapterRoots


@pytest.fixture
def tasks(pair: Pair, tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    shutil.copytree(pair.adapter, folder / "small")
    save_adapter(tiny_llama(), folder / "large", r=40, target_modules=["down_proj"])
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"no")
    return folder


def parsed(options: list[str]) -> object:
    return make_arg_parser(FlexibleArgumentParser()).parse_args(options)


def test_ranks_and_slots_are_those_of_the_adapters(pair: Pair, tasks: Path) -> None:
    found = find_adapters(AdapterRoots([tasks]))
    assert found.ranks == {"large": 40, "small": 4}
    assert set(found.broken) == {"broken"}
    arguments = parsed(vllm_options(str(pair.base), "lora", found, []))
    assert (arguments.model_tag, arguments.host, arguments.enable_lora) == (str(pair.base), "127.0.0.1", True)
    assert (arguments.max_lora_rank, arguments.max_loras, arguments.max_cpu_loras) == (64, 2, 2)
    assert arguments.lora_target_modules == ["down_proj", "q_proj", "v_proj"]
    assert arguments.served_model_name == ["base"]


def test_given_options_have_precedence(pair: Pair, tasks: Path) -> None:
    given = [
        "--max-lora-rank=128",
        "--host",
        "0.0.0.0",
        "--max_loras",
        "5",
        "--served-model-name",
        "mine",
        "--port",
        "1",
    ]
    arguments = parsed(vllm_options(str(pair.base), "lora", find_adapters(AdapterRoots([tasks])), given))
    assert (arguments.max_lora_rank, arguments.host, arguments.max_loras, arguments.port) == (128, "0.0.0.0", 5, 1)
    assert arguments.max_cpu_loras is None  # vLLM's default: as many as max_loras
    assert arguments.served_model_name == ["mine"]


def test_no_adapters_yet_and_adapters_of_lm_head() -> None:
    arguments = parsed(vllm_options("org/base", "lora", Found({}, frozenset(), {}), []))
    assert (arguments.model_tag, arguments.max_lora_rank, arguments.max_loras) == ("org/base", 16, 1)
    assert arguments.lora_target_modules is None
    found = Found({"a": 4}, frozenset({"q_proj", "lm_head"}), {})
    assert parsed(vllm_options("llama2-7b", "lora", found, [])).lora_target_modules is None
    assert parsed(vllm_options("llama2-7b", "lora", found, [])).model_tag == "meta-llama/Llama-2-7b-hf"


def test_many_adapters_share_slots() -> None:
    found = Found({f"task-{i}": 8 for i in range(500)}, frozenset({"q_proj"}), {})
    arguments = parsed(vllm_options("org/base", "lora", found, []))
    assert (arguments.max_loras, arguments.max_cpu_loras) == (8, 64)


def test_a_rank_that_vllm_does_not_serve() -> None:
    with pytest.raises(AdapterError, match="b has rank 513, vLLM serves up to 512; serve with --mode merged"):
        vllm_options("org/base", "lora", Found({"a": 4, "b": 513}, frozenset(), {}), [])


def test_an_adapter_that_cannot_be_lora(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some methods have no exact low-rank factors: such an adapter has no rank, and can only be merged."""
    monkeypatch.setattr(Adapter, "rank", lambda adapter, module: None if adapter.name == "large" else 4)
    found = find_adapters(AdapterRoots([tasks]))
    assert (found.ranks, found.not_lora, found.kinds) == ({"small": 4}, {"large": "peanut"}, {"q_proj", "v_proj"})
    assert (found.names("lora"), found.names("auto")) == (["small"], ["large", "small"])
    note = (
        "large will not be served: its update (peanut) cannot be expressed as LoRA; --mode merged or auto serves it"
    )
    assert note in list(found.notes("lora"))
    assert note not in [*found.notes("auto"), *found.notes("merged")]


def test_an_adapter_without_modules_is_merged(tmp_path: Path) -> None:
    """What only replaces tensors has no rank."""
    train(tiny_llama(), LNTuningConfig(task_type="CAUSAL_LM"), tmp_path / "base", tmp_path / "tasks" / "norms")
    found = find_adapters(AdapterRoots([tmp_path / "tasks"]))
    assert (found.ranks, found.not_lora) == ({}, {"norms": "tensors replaced whole"})
    assert (found.names("lora"), found.names("auto")) == ([], ["norms"])


def test_refusals(pair: Pair, tasks: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run_here("peanut-serve", "--base", pair.base, "--adapters", tmp_path / "nothing")
    assert (done.returncode, "neither a folder of adapters nor a Hub id" in done.stderr) == (1, True)
    done = run_here("peanut-serve", "--base", tmp_path / "none", "--adapters", tasks, "--dry-run")
    assert (done.returncode, "none, and it is not a valid Hub id; check the path" in done.stderr) == (1, True)
    command = ("peanut-serve", "--base", pair.base, "--adapters", tasks)
    done = run_here(*command, "--cache-size", "many")
    assert (done.returncode, done.stderr.count("\n")) == (1, 2)  # and the note on the broken adapter
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    done = run_here(*command)
    assert "VLLM_PLUGINS is other, without peanut_serve; add it" in done.stderr
    assert "note: broken will not be served: " in done.stderr


def test_names_of_variants_that_there_are_not(pair: Pair, tasks: Path, run_here: Run, tmp_path: Path) -> None:
    """They are refused before vLLM starts, which takes minutes."""
    state = tmp_path / "state"
    state.mkdir()
    records = {"prod": {"source": "small"}, "old": {"source": "gone"}, "large": {"source": "large", "hidden": True}}
    written = {"schema_version": 1, "base": open_checkpoint(pair.base).fingerprint, "variants": records}
    (state / "variants.json").write_text(json.dumps(written))
    command = ("peanut-serve", "--base", pair.base, "--adapters", tasks, "--mode", "auto", "--state", state)
    known = "there is no such variant among base, prod, small"
    wanted = {
        ("--pin", "none"): f"--pin none: {known}",
        ("--preload", "small", "--preload", "none"): f"--preload none: {known}",
        ("--pin", "old"): f"--pin old: {known}",  # its files are gone
        ("--pin", "large"): f"--pin large: {known}",  # an operator removed it
        ("--pin", "broken"): "--pin broken: ",
        (
            "--pin",
            "prod",
            "--pin",
            "base",
            "--preload",
            "small",
            "--api-server-count=2",
        ): "--api-server-count must be",
    }
    for options, refusal in wanted.items():
        done = run_here(*command, *options)
        assert done.returncode == 1
        last = [line for line in done.stderr.splitlines() if line.startswith("peanut-serve: ")]
        assert len(last) == 1, done.stderr
        assert last[0].startswith(f"peanut-serve: {refusal}"), last


def test_one_api_server(pair: Pair, tasks: Path, run_here: Run) -> None:
    """Also where vLLM would start one per data-parallel rank: adapters are resolved in only one of them."""
    found = find_adapters(AdapterRoots([tasks]))
    assert parsed(vllm_options(str(pair.base), "lora", found, ["--data-parallel-size", "2"])).api_server_count == 1
    assert parsed(vllm_options(str(pair.base), "lora", found, ["--headless"])).api_server_count is None
    done = run_here("peanut-serve", "--base", pair.base, "--adapters", tasks, "--api-server-count=2")
    assert (done.returncode, "--api-server-count must be 1" in done.stderr) == (1, True)


def test_swapping(pair: Pair, tasks: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The options and environment of vLLM's processes, and the options that are not supported with swapping."""
    merge(pair.base, pair.adapter, tasks / "whole")
    found = find_adapters(AdapterRoots([tasks]))
    assert (set(found.ranks), found.merged) == ({"large", "small"}, ("whole",))
    assert [note.split()[0] for note in found.notes("lora")] == ["broken", "whole"]
    assert [note.split()[0] for note in found.notes("merged")] == ["broken"]
    merged = parsed(vllm_options(str(pair.base), "merged", found, []))
    assert (merged.enable_lora, merged.shutdown_timeout) == (None, 30)
    assert merged.worker_extension_cls.endswith(".VariantWorker")
    auto = parsed(vllm_options(str(pair.base), "auto", Found({"a": 4, "b": 513}, frozenset({"q_proj"}), {}), []))
    assert (auto.enable_lora, auto.max_lora_rank) == (True, 16)  # b will be swapped
    settings = server_settings(
        str(pair.base), host_cache="2GiB", packed_cache="0", state=tmp_path, mode="merged", roots=["org/one"],
        cache=tmp_path,
    )  # fmt: skip
    assert (settings.host_cache, settings.packed_cache) == (2 << 30, 0)
    variables = server_variables(settings, {})
    assert {"peanut_serve", "peanut_serve_variants"} <= set(variables["VLLM_PLUGINS"].split(","))
    assert server_variables(settings, {"VLLM_PLUGINS": "mine"})["VLLM_PLUGINS"] == "mine,peanut_serve_variants"
    with pytest.raises(OptionError, match="PROMETHEUS_MULTIPROC_DIR is set, .*: unset it"):
        server_variables(settings, {"PROMETHEUS_MULTIPROC_DIR": "/tmp"})
    assert ServerSettings.read(variables) == settings
    monkeypatch.delenv("PEANUT_ADMIN_KEY", raising=False)
    for options, refusal in (
        (["--data-parallel-size", "2"], "--data-parallel-size cannot be used with --mode merged"),
        (["--lora-modules", "mine=/tmp"], "--lora-modules cannot be used with --mode merged: --adapters decides"),
        (["--max-body", "much"], "'much' is not a valid size"),
        (["--host-cache", "much"], "'much' is not a valid size"),
        (["--packed-cache", "much"], "'much' is not a valid size"),
        (["--admin-port", "8001"], "--admin-port needs a key: set PEANUT_ADMIN_KEY"),
        (["--audit-log", "log"], "--audit-log is for the admin API, which is off; give --admin-port too"),
        (["--console-host", "gpu7"], "--console-host is for the admin API, which is off; give --admin-port too"),
        (["--admin-host", "::"], "--admin-host is for the admin API, which is off; give --admin-port too"),
    ):
        done = run_here("peanut-serve", "--base", pair.base, "--adapters", tasks, "--mode", "merged", *options)
        assert (done.returncode, refusal in done.stderr) == (1, True), done.stderr


def test_an_open_address_is_noted(pair: Pair, tasks: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (tasks.parent / "keys").write_text("a-key")
    note = "note: --host 0.0.0.0 can be reached by others, who need no key"
    command = ("peanut-serve", "--base", pair.base, "--adapters", tasks, "--dry-run", "--host")
    assert note in run_here(*command, "0.0.0.0").stderr
    assert note not in run_here(*command, "127.0.0.1").stderr
    assert note not in run_here(*command, "0.0.0.0", "--api-key-file", tasks.parent / "keys").stderr
    assert note not in run_here(*command, "0.0.0.0", "--api-key", "a-key").stderr
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    assert note not in run_here(*command, "0.0.0.0").stderr


def test_an_adapter_on_the_hub(pair: Pair) -> None:
    with serve_hub({"me/style": pair.adapter}) as hub:
        command = ("peanut-serve", "--base", pair.base, "--adapters", "me/style", "--dry-run")
        done = run(*command, **hub_settings(hub, pair))
    assert "variants: me/style" in done.stdout, done.stderr


def test_the_settings_in_a_config_file_of_vllm(pair: Pair, tasks: Path, tmp_path: Path) -> None:
    """They count: our defaults, which would override them as options of the command line, are left out."""
    found = find_adapters(AdapterRoots([tasks]))
    config = tmp_path / "vllm.yaml"
    config.write_text("max_loras: 2\nhost: 0.0.0.0\n")
    for given in (["--config", str(config)], [f"--config={config}"]):
        options = vllm_options(str(pair.base), "lora", found, given)
        assert {"--max-loras", "--host"} & set(options) == set()
        arguments = parsed(options)
        assert (arguments.max_loras, arguments.host) == (2, "0.0.0.0")
    with pytest.raises(OptionError, match="there are several --config files"):
        vllm_options(str(pair.base), "lora", found, ["--config", str(config), f"--config={config}"])
    config.write_text("lora-modules: []")
    with pytest.raises(OptionError, match="--lora-modules cannot be used with --mode lora"):
        vllm_options(str(pair.base), "lora", found, ["--config", str(config)])
    config.write_text("model: other")
    with pytest.raises(OptionError, match=r"sets model, which is --base"):
        vllm_options(str(pair.base), "lora", found, ["--config", str(config)])
    with pytest.raises(OptionError, match=r"--config .*none.yaml cannot be read"):
        vllm_options(str(pair.base), "lora", found, ["--config", str(tmp_path / "none.yaml")])


def test_a_base_copy_is_for_weights_that_are_swapped(tasks: Path, pair: Pair, run_here: Run) -> None:
    options = ("--dry-run", "--base-copy", "device")
    done = run_here("peanut-serve", "--base", pair.base, "--adapters", tasks, *options)
    assert done.returncode != 0
    assert "--base-copy device is for weights that are swapped, but the mode is lora" in done.stderr


def test_a_setting_has_the_name_of_its_option(run_here: Run) -> None:
    """A refusal names the option by the setting."""
    shown = run_here("peanut-serve", "--help").stdout
    elsewhere = {"mode", "roots", "cache", "cache_bytes", "device"}  # refused by their own messages
    for name in set(ServerSettings.model_fields) - elsewhere:
        assert f"--{name.replace('_', '-')}" in shown


def test_a_poisoned_folder_does_not_keep_the_others_from_being_served(tasks: Path) -> None:
    for name, config in (("deep", "[" * 1_000_000), ("broken-text", "\udcff")):
        shutil.copytree(tasks / "small", tasks / name)
        (tasks / name / "adapter_config.json").write_text(config, errors="surrogateescape")
    shutil.copytree(tasks / "small", tasks / "sparse")
    with (tasks / "sparse" / "adapter_config.json").open("wb") as file:
        file.truncate(2 << 30)
    found = find_adapters(AdapterRoots([tasks]))
    assert set(found.ranks) == {"large", "small"}
    assert {"deep", "broken-text", "sparse"} < set(found.broken)
    assert "larger than 64 MiB" in found.broken["sparse"]


def test_an_adapter_with_the_name_of_the_base(pair: Pair, tasks: Path, run_here: Run) -> None:
    command = (
        "peanut-serve",
        "--base",
        pair.base,
        "--adapters",
        tasks,
        "--dry-run",
        "--served-model-name",
        "a",
        "small",
    )
    assert "note: small will not be served: the base has this name" in run_here(*command).stderr
    assert base_names(str(pair.base), ["--served-model-name=one", "--port", "1"]) == ["one"]
    assert base_names(str(pair.base), ["--port", "1"]) == [pair.base.name]


@pytest.mark.slow  # vLLM is imported
def test_vllm_without_peanut_serve(tasks: Path, tmp_path: Path) -> None:
    """`PEANUT_ADAPTERS=... vllm serve`: the plugin sets up what `peanut-serve --mode lora` would."""
    script = """
import os
from vllm.plugins import load_endpoint_plugins, load_general_plugins
load_general_plugins()
from peanut_serve.settings.server import ServerSettings
settings = ServerSettings.read()
print(settings.mode, settings.roots[0], [plugin.name for plugin in load_endpoint_plugins(("generate",))])
"""
    environment = {**os.environ, "PEANUT_ADAPTERS": str(tasks), "PEANUT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.splitlines()[-1] == f"lora {tasks} ['peanut_serve_variants']", done.stderr
