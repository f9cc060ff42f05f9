"""`--resume`: a second run takes over what the first had finished; the bytes are those of a run without a break."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.commands import Run
from support.tiny_models import Pair, edit_config, save_adapter, tiny_llama

from converters import merge, merge_each
from converters.errors import OutputError, OutputExistsError
from converters.evaluation.worker import Worker
from converters.files import blocks
from converters.outputs.checkpoint import jobs
from converters.outputs.checkpoint import write as executor


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def staging(output: Path) -> Path:
    return output.with_name(f".{output.name}.peanut-staging")


@pytest.fixture
def fail_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Let the disk fail when that many tensors are written; None: never."""
    end, done = jobs.Output.end, []

    def arrange(count: int | None) -> None:
        done.clear()

        def end_or_fail(self: jobs.Output, verify: bool, worker: Worker) -> None:
            if count is not None and len(done) >= count:
                raise OSError("the disk is on fire")
            end(self, verify, worker)
            done.append(self.tensor.name)

        monkeypatch.setattr(jobs.Output, "end", end_or_fail)

    monkeypatch.setattr(executor, "find_devices", lambda device: [torch.device("cpu")])  # then the count is exact
    return arrange


def test_goes_on_after_every_tensor(pair: Pair, fail_after: Callable[[int | None], None]) -> None:
    options = {"resume": True, "max_shard_size": "30KB", "dtype": "bf16"}
    whole = merge(pair.base, pair.adapter, pair.output.with_name("whole"), **options)
    for count in range(len(whole.plan.tensors)):
        fail_after(count)
        with pytest.raises(OutputError, match=r"the disk is on fire"):
            merge(pair.base, pair.adapter, pair.output, **options)
        assert not pair.output.exists()
        assert not (staging(pair.output) / "config.json").exists()
        fail_after(None)
        result = merge(pair.base, pair.adapter, pair.output, **options)
        assert result.taken_over == count
        assert result.verification == whole.verification
        assert files(pair.output) == files(whole.output)
        assert not staging(pair.output).exists()
        shutil.rmtree(pair.output)


@pytest.fixture
def interrupted(pair: Pair, fail_after: Callable[[int | None], None]) -> Pair:
    """Seven tensors are written, the eighth was not."""
    fail_after(7)
    with pytest.raises(OutputError):
        merge(pair.base, pair.adapter, pair.output, resume=True)
    fail_after(None)
    return pair


def test_what_was_damaged_since_is_written_again(interrupted: Pair) -> None:
    """As after a power failure: the journal says a tensor is there, and its bytes are not."""
    with (staging(interrupted.output) / "model.safetensors").open("r+b") as file:
        file.seek(20_000)
        file.write(bytes(64))
    result = merge(interrupted.base, interrupted.adapter, interrupted.output, resume=True)
    assert result.taken_over == 6
    whole = merge(interrupted.base, interrupted.adapter, interrupted.output.with_name("whole"))
    assert files(result.output) == files(whole.output)


@pytest.mark.parametrize("what", ["dtype", "base", "adapter", "torn journal"])
def test_another_merge_takes_nothing_over(interrupted: Pair, what: str) -> None:
    options = {"dtype": "bf16"} if what == "dtype" else {}
    if what == "base":
        tiny_llama().save_pretrained(interrupted.base)
    if what == "adapter":
        save_adapter(tiny_llama(), interrupted.adapter, 9)
    if what == "torn journal":
        (journal,) = (staging(interrupted.output) / ".journal").glob("*.jsonl")
        journal.write_bytes(journal.read_bytes()[:-5])
    result = merge(interrupted.base, interrupted.adapter, interrupted.output, resume=True, **options)
    assert result.taken_over == (6 if what == "torn journal" else 0)
    whole = merge(interrupted.base, interrupted.adapter, interrupted.output.with_name("whole"), **options)
    assert files(result.output) == files(whole.output)


def test_another_stack_of_layers_takes_nothing_over(pair: Pair, fail_after: Callable[[int | None], None]) -> None:
    """θ, names and shapes are the same; the layers of the base that are copied are not."""
    shutil.rmtree(pair.adapter)
    stack = {"layer_replication": [[0, 2], [0, 1]], "target_modules": ["q_proj"], "init_lora_weights": False}
    get_peft_model(tiny_llama(), LoraConfig(r=2, **stack)).save_pretrained(pair.adapter)
    fail_after(7)
    with pytest.raises(OutputError):
        merge(pair.base, pair.adapter, pair.output, resume=True)
    fail_after(None)
    edit_config(pair.adapter, layer_replication=[[0, 2], [1, 2]])
    assert merge(pair.base, pair.adapter, pair.output, resume=True).taken_over == 0


def test_without_resume_it_starts_anew(interrupted: Pair) -> None:
    assert merge(interrupted.base, interrupted.adapter, interrupted.output).taken_over == 0


def test_what_is_finished_stays(pair: Pair, run_here: Run) -> None:
    merge(pair.base, pair.adapter, pair.output)
    before = (pair.output / "model.safetensors").stat()
    done = run_here("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output, "--resume")
    assert "21 of 21 tensors were written by an earlier run" in done.stdout
    assert (pair.output / "model.safetensors").stat().st_ino == before.st_ino
    with (pair.output / "model.safetensors").open(
        "r+b"
    ) as file:  # no longer whole: an existing folder like any other
        file.seek(20_000)
        file.write(bytes(64))
    with pytest.raises(OutputExistsError, match="exists; choose another output"):
        merge(pair.base, pair.adapter, pair.output, resume=True)


def test_one_of_several_outputs_was_published(pair: Pair) -> None:
    """A crash between the renames at the end."""
    save_adapter(tiny_llama(), pair.base.parent / "second", 5)
    adapters = [pair.adapter, pair.base.parent / "second"]
    merge(pair.base, pair.adapter, pair.output / "adapter")
    results = merge_each(pair.base, adapters, pair.output, resume=True)
    assert [result.taken_over for result in results] == [21, 0]
    assert sorted(path.name for path in pair.output.iterdir()) == ["adapter", "second"]


@pytest.mark.slow
def test_a_stopped_command_says_how_to_go_on(pair: Pair) -> None:
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    model.save_pretrained(pair.base)
    shutil.rmtree(pair.adapter)
    save_adapter(model, pair.adapter, r=16)
    program = Path(sys.executable).parent / "peanut-merge"
    command = [program, "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output, "--resume"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        journal = staging(pair.output) / ".journal" / "model.safetensors.jsonl"
        while not journal.exists() and child.poll() is None:
            time.sleep(0.001)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
    assert said.strip() == "peanut-merge: stopped; --resume continues from here"
    assert not pair.output.exists()
    taken = merge(pair.base, pair.adapter, pair.output, resume=True).taken_over
    assert taken >= 1
    assert files(merge(pair.base, pair.adapter, pair.output.with_name("whole")).output) == files(pair.output)


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_the_same_bytes_whatever_the_blocks_and_workers(
    make_pair: Callable[..., Pair], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=352, num_hidden_layers=2)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    pair = make_pair(model, r=16, depth=1, act_fn="silu", target_modules=targets)
    wanted = files(merge(pair.base, pair.adapter, pair.output, dtype=dtype).output)
    for workers, block in ((1, 8 << 20), (2, 1), (5, 20_000), (3, 70_000)):
        monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
        monkeypatch.setattr(executor, "find_devices", lambda device, n=workers: [torch.device("cpu")] * n)
        found = files(merge(pair.base, pair.adapter, pair.output, dtype=dtype, overwrite=True).output)
        assert found == wanted


def test_an_interrupted_run_in_an_empty_folder(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its staging folder is inside, and does not make the folder one that is not empty."""
    pair.output.mkdir()

    def fail(plan: object) -> str:
        raise OSError("disk on fire")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="disk on fire"):
        patch.setattr("converters.outputs.checkpoint.draft.build_model_card", fail)
        merge(pair.base, pair.adapter, pair.output, resume=True)
    assert [path.name for path in pair.output.iterdir()] == [".peanut-staging"]
    result = merge(pair.base, pair.adapter, pair.output, resume=True)
    assert result.taken_over == len(result.plan.tensors)
    assert (pair.output / "config.json").is_file()
    assert not (pair.output / ".peanut-staging").exists()
