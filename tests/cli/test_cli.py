"""The commands as a person or a script runs them."""

import gc
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Run, run
from support.tiny_models import Pair, edit_config

from converters import __version__
from converters.cli.importing import imports_that_stay


def test_merge_prints_the_result_on_stdout_and_nothing_else(pair: Pair) -> None:
    done = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output)
    assert done.returncode == 0
    assert done.stdout.startswith(f"wrote {pair.output}: 0.1 MB in ")
    assert "4 updated" in done.stdout
    assert "verified: 21 tensors" in done.stdout
    assert done.stderr == ""


def test_json(pair: Pair) -> None:
    done = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output, "--json")
    result = json.loads(done.stdout)
    assert result["output"] == str(pair.output)
    assert result["counts"] == {"kept": 17, "updated": 4}
    assert result["verification"]["max_ulp"] <= 0.5
    assert [len(digest) for digest in result["adapter_digests"]] == [64]


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_prints_the_plan_and_writes_nothing(pair: Pair, as_json: bool) -> None:
    options = ["--dry-run", "--max-shard-size", "40KB"] + (["--json"] if as_json else [])
    done = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output, *options)
    assert done.returncode == 0
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base"]
    if as_json:
        plan = json.loads(done.stdout)
        assert plan["tensors"]["model.layers.0.self_attn.q_proj.weight"] == "updated"
        assert sum(plan["shards"].values()) == plan["total_size"]
    else:
        assert f"would write {pair.output}: 0.1 MB" in done.stdout
        assert "model-00001-of-00004.safetensors" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "dtype 'int8' is unknown; expected auto, bf16, fp16, fp32"),
        (
            ["--device", "cuda:9"],
            "device 'cuda:9' is not available: this PyTorch sees 0 CUDA devices; use --device cpu",
        ),
        (["--device", "abacus"], "device 'abacus' is unknown; expected auto, cpu, cuda or cuda:N"),
        (["--max-shard-size", "big"], "'big' is not a valid size; expected something like 5GB"),
        (["--labels", "/nowhere.json"], "/nowhere.json: expected a JSON list of labels"),
    ],
)
def test_a_refusal_is_one_line_and_exit_1(pair: Pair, options: list[str], message: str) -> None:
    done = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output, *options)
    assert done.returncode == 1
    assert done.stderr.startswith(f"peanut-merge: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base"]


def test_a_missing_option_is_a_usage_error(pair: Pair) -> None:
    done = run("peanut-merge", "--base", pair.base)
    assert done.returncode == 2
    assert "--adapter" in done.stderr


def test_notes_go_to_stderr(pair: Pair) -> None:
    edit_config(pair.adapter, base_model_name_or_path="other/model")
    done = run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output)
    assert (
        done.stderr.strip()
        == "note: the adapter was trained on 'other/model'; the local base is taken for the same weights"
    )


def test_labels_from_a_file(tmp_path: Path) -> None:
    from converters.errors import OptionError
    from converters.models.labels import read_labels

    path = tmp_path / "labels.json"
    path.write_text('["a", "b"]')
    assert read_labels(path) == ["a", "b"]
    path.write_text('{"1": "b", "0": "a"}')
    assert read_labels(path) == ["a", "b"]
    for wrong in ('["a", "a"]', "[1]", "[]", '{"x": "y"}', "3", "{"):
        path.write_text(wrong)
        with pytest.raises(OptionError):
            read_labels(path)


@pytest.mark.parametrize("command", ["peanut-merge", "peanut-inspect"])
def test_help_and_version(command: str) -> None:
    helped = run(command, "--help")
    assert helped.returncode == 0
    assert "Examples:" in helped.stdout
    assert f"{command} " in helped.stdout.split("Examples:")[1]
    assert run(command, "--version").stdout.strip() == f"peanut-serve {__version__}"


@pytest.mark.slow
def test_progress_on_a_terminal(pair: Pair) -> None:
    main, other = pty.openpty()
    program = Path(sys.executable).parent / "peanut-merge"
    command = [program, "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output]
    done = subprocess.run(command, stderr=other, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"})
    os.close(other)
    said = b""
    while select.select([main], [], [], 0.5)[0]:
        try:
            said += os.read(main, 65536)
        except OSError:
            break
    os.close(main)
    assert done.returncode == 0
    assert b"merging" in said


@pytest.mark.slow
def test_inspect_an_adapter(pair: Pair) -> None:
    done = run("peanut-inspect", pair.adapter)
    assert done.returncode == 0
    for fact in ("hf-peft", "adapter_config.json says peft_type PEANUT", "columns", "relu", "q_proj, v_proj", "768"):
        assert fact in done.stdout
    facts = json.loads(run("peanut-inspect", pair.adapter, "--json").stdout)
    assert (facts["r"], facts["depth"], facts["scaling"], facts["parameters"]) == (4, 0, 0.5, 768)
    refused = run("peanut-inspect", pair.base)
    assert refused.returncode == 1
    assert refused.stderr.startswith("peanut-inspect: ")


@pytest.mark.slow
def test_inspect_with_a_base_shows_where_the_adapter_acts(pair: Pair) -> None:
    from safetensors.torch import load_file

    from converters import delta_weight, load_adapter

    done = run("peanut-inspect", pair.adapter, "--base", pair.base, "--json")
    norms = json.loads(done.stdout)["norms"]
    adapter, base = load_adapter(pair.adapter), load_file(pair.base / "model.safetensors")
    assert [row["module"] for row in norms] == [
        f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in ("q", "v")
    ]
    for row in norms:
        w0 = base[f"{row['module']}.weight"]
        delta = delta_weight(w0.double(), adapter.tweaker(row["module"]))
        assert row["delta"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row["weight"] == pytest.approx(float(w0.norm()), rel=1e-5)
    shown = run("peanut-inspect", pair.adapter, "--base", pair.base).stdout
    for row in norms:  # each of them stands in the table
        assert f"{row['delta'] / row['weight']:.4f}" in shown
    assert "layers.1" in shown


@pytest.mark.slow
def test_inspect_records_the_base(pair: Pair) -> None:
    assert run("peanut-inspect", pair.adapter, "--record-base").stderr.strip().endswith("--record-base needs --base")
    done = run("peanut-inspect", pair.adapter, "--base", pair.base, "--record-base")
    assert done.returncode == 0
    assert (pair.adapter / "peanut_base.json").exists()
    assert run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output).returncode == 0


@pytest.mark.slow
def test_inspect_records_a_merged_base(pair: Pair) -> None:
    """An adapter that was trained on a merged model: recording it is how to say so."""
    assert run("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output).returncode == 0
    done = run("peanut-inspect", pair.adapter, "--base", pair.output, "--record-base")
    assert done.returncode == 0, done.stderr
    second = pair.output.with_name("second")
    assert run("peanut-merge", "--base", pair.output, "--adapter", pair.adapter, "-o", second).returncode == 0


def test_every_public_name_resolves() -> None:
    import converters

    assert all(getattr(converters, name) is not None for name in converters.__all__)
    assert callable(converters.merge)


def test_importing_converters_imports_no_model_code() -> None:
    code = (
        "import sys, converters; light = set(sys.modules); converters.merge, converters.load_adapter; "
        "heavy = {'transformers', 'peft', 'vllm', 'onnx', 'peanut_serve'}; "
        "print(sorted(m for m in sys.modules if m in heavy), 'torch' in light)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[] False"


def test_a_merge_of_a_language_model_imports_no_model_code(pair: Pair) -> None:
    code = (
        f"import sys, converters; converters.merge({str(pair.base)!r}, {str(pair.adapter)!r}, {str(pair.output)!r}); "
    )
    code += "print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_stop_that_c_code_turns_into_another_error_is_still_a_stop(
    pair: Pair, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with Ctrl-C inside safetensors: its bindings raised a ValueError in place of ours."""
    from converters.adapters.store import SafetensorsStore

    def interrupted(store: SafetensorsStore, key: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(SafetensorsStore, "tensor", interrupted)
    done = run_here("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "peanut-merge: stopped; nothing incomplete was left\n"
    assert not pair.output.exists()


def test_what_is_imported_is_left_out_of_collections() -> None:
    try:
        with imports_that_stay():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert not any(one is made for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_a_failed_import_leaves_collections_on() -> None:
    with pytest.raises(ImportError), imports_that_stay():
        raise ImportError("missing")
    assert gc.isenabled()
    gc.unfreeze()
