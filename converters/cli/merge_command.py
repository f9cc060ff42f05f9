"""The command `peanut-merge`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.cli.onnx_command import (
    Evaluation,
    OnnxChoices,
    Opset,
    Quantize,
    SelfMerging,
    Swappable,
    TransformersJs,
    write_onnx,
)
from converters.cli.options import LAYOUTS, AdapterRevision, Json, Layout, Revision, Scaling, Token, Version
from converters.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from converters.outputs.upload import Push
    from converters.plans.merge import Plan

HELP = f"""Merge a trained PEANuT adapter into its base model: W = W0 + f(W0; θ).

Writes a checkpoint that transformers and vLLM load as any other model. Nothing is written until everything
that can be refused was refused, and the output appears whole or not at all.

Examples:

  peanut-merge --base llama2-7b --adapter ./gsm8k

  peanut-merge --base ./smollm2 --adapter ./json -o ./smollm2-json --dtype bf16

  peanut-merge --base llama2-7b --adapter ./gsm8k --adapter ./style=0.5

  peanut-merge --base llama2-7b --adapter ./gsm8k --adapter ./code -o ./variants --each --share

  peanut-merge --base llama2-7b --adapter ./gsm8k --push-to-hub me/llama2-gsm8k --private

  peanut-merge --base llama2-7b --adapter ./gsm8k --format lora -o ./gsm8k-lora

  peanut-merge --base vit-base --adapter ./pets --format onnx --quantize int8 --eval-data ./pets-test

  peanut-merge --base vit-base --adapter ./pets --adapter ./cars --format onnx --each --swappable -o ./tasks-onnx

  peanut-merge --base roberta-base --adapter ./mrpc/pytorch_model.bin --scaling 0.1 --labels labels.json

{LAYOUTS}
"""

_Base = Annotated[
    str,
    typer.Option("--base", help="Folder, Hub id, llama2-7b, llama3-8b, qwen3-8b, ..., or 'self': see the README."),
]


def run_command(
    base: _Base,
    adapter: Annotated[
        list[str], typer.Option("--adapter", help="Folder, weights or Hub id; again to sum several, PATH=0.5 scales.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: ./<base>-<adapter>")] = None,
    output_format: Annotated[
        str,
        typer.Option("--format", help="merged (a checkpoint), onnx, lora (a LoRA adapter) or peft (a PEANuT one)."),
    ] = "merged",
    layout: Layout = None,
    scaling: Scaling = None,
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    token: Token = None,
    dtype: Annotated[str, typer.Option(help="auto (as the base), bf16, fp16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="Where f is evaluated: auto, cpu, cuda, cuda:N.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Like 5GB; 'base' keeps the base's sharding.")] = "5GB",
    labels: Annotated[
        Path | None, typer.Option(help="JSON list of class labels, for a head that comes with the adapter.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output, at the end.")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="Merge although the base is another.")] = False,
    verify: Annotated[bool, typer.Option(help="Check the written files before they are published.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and the sizes; write nothing.")] = False,
    each: Annotated[
        bool, typer.Option("--each", help="An output per adapter, -o/<adapter>, reading the base once.")
    ] = False,
    share: Annotated[
        bool,
        typer.Option(
            "--share", help="Link to files that no adapter changes, instead of copying; or, ONNX, one file."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where such a run ended; keep what is done if this one ends.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Fetch a base on the Hub shard by shard; two are on the disk at most.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Upload the finished folder to this Hub repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create that repository private.")] = False,
    push_revision: Annotated[
        str | None, typer.Option("--push-revision", help="Branch of that repository to upload to.")
    ] = None,
    opset: Opset = None,
    quantize: Quantize = None,
    eval_data: Evaluation = None,
    transformersjs: TransformersJs = False,
    swappable: Swappable = False,
    self_merging: SelfMerging = False,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Merge, or convert; see `HELP`."""
    if output_format not in ("merged", "onnx", "lora", "peft"):
        raise OptionError(f"--format {output_format} is unknown; wanted merged, onnx, lora or peft")
    for name, given in (("--each", each), ("--share", share), ("--resume", resume), ("--stream", stream)):
        is_onnx_s = output_format == "onnx" and name in ("--each", "--share")
        if given and output_format != "merged" and not is_onnx_s:
            raise OptionError(f"{name} is for merged checkpoints, not for --format {output_format}")
    onnx = OnnxChoices(opset, tuple(quantize or ()), eval_data, transformersjs, swappable, self_merging)
    if output_format == "onnx":
        dtype = "fp32" if dtype == "auto" else dtype
    else:
        onnx.check_unused(output_format)
    from converters.adapters.opening import open_weighted
    from converters.api.merging import prepare_each, prepare_merge
    from converters.cli import console
    from converters.evaluation.worker import find_devices
    from converters.models.labels import read_labels
    from converters.outputs.checkpoint.write import check_merge, run_merges
    from converters.outputs.upload import Push
    from converters.plans.several import name_outputs, share_tensors

    push = Push(push_to_hub, private, push_revision, token)
    if each and push.repo_id and output_format != "onnx":
        raise OptionError("--push-to-hub takes one output, --each makes several; push each with: hf upload")
    adapters = open_weighted(adapter, layout=layout, scaling=scaling, revision=adapter_revision, token=token)
    prepare = partial(
        prepare_each if each else prepare_merge, revision=revision, token=token, dtype=dtype, force_base=force_base,
        max_shard_size=max_shard_size, labels=read_labels(labels) if labels else None, stream=stream,
    )  # fmt: skip
    prepared = prepare(base, adapters)
    plans = prepared if isinstance(prepared, list) else [prepared]
    if output_format == "onnx":
        _show_notes(plans)
        write_onnx(
            plans, output, onnx, push, share=share, device=device, overwrite=overwrite, verify=verify,
            dry_run=dry_run, as_json=as_json,
        )  # fmt: skip
        return
    outputs = name_outputs(plans, output) if each else {output or plans[0].default_output: plans[0]}
    find_devices(device)
    _show_notes(plans)
    if output_format != "merged":
        write = _write_lora if output_format == "lora" else _write_peft
        write(plans[0], output or Path(f"{plans[0].name}-{output_format}"), push, overwrite, device, dry_run, as_json)
        return
    outputs = share_tensors(outputs) if share else outputs
    if dry_run or push.repo_id:
        check_merge(outputs, overwrite, share, resume)
    if dry_run:
        console.print_plans(outputs, as_json, several=each)
        return
    push.prepare(plans)
    if stream:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # two bars at once are a mess
    total = sum(plan.total_size for plan in plans) * (2 if verify else 1)
    with console.Progress(total, "merging", as_bytes=True) as advance:
        results = run_merges(
            outputs, device=device, overwrite=overwrite, verify=verify, share=share, resume=resume, advance=advance
        )
    console.print_results(results, as_json, several=each, pushed_to=push.upload(results[0].output))


def _show_notes(plans: "Sequence[Plan]") -> None:
    from converters.cli import console

    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        console.err.print(f"note: {note}", markup=False)


def _write_lora(
    plan: "Plan", output: Path, push: "Push", overwrite: bool, device: str, dry_run: bool, as_json: bool
) -> None:
    """`--format lora`."""
    from converters.cli import console, console_adapters
    from converters.outputs.lora import plan_lora_adapter, write_lora_adapter

    converted = plan_lora_adapter(plan, output, overwrite)
    if dry_run:
        console_adapters.print_lora_adapter(converted, None, as_json)
        return
    push.prepare([plan])
    with console.Progress(converted.source_bytes, "evaluating f", as_bytes=True) as advance:
        check = write_lora_adapter(converted, device=device, overwrite=overwrite, advance=advance)
    console_adapters.print_lora_adapter(converted, check, as_json, push.upload(converted.output))


def _write_peft(
    plan: "Plan", output: Path, push: "Push", overwrite: bool, device: str, dry_run: bool, as_json: bool
) -> None:
    """`--format peft`."""
    from converters.cli import console_adapters
    from converters.outputs.peft import plan_peft_adapter, write_peft_adapter

    converted = plan_peft_adapter(plan, output, overwrite)
    pushed_to = None
    if not dry_run:
        push.prepare([plan])
        write_peft_adapter(converted, overwrite=overwrite)
        pushed_to = push.upload(converted.output)
    console_adapters.print_peft_adapter(converted, dry_run, as_json, pushed_to)
