"""The command `peanut-merge`: its options, as objects."""

from converters.api.options import MergeOptions, Sources
from converters.cli import options
from converters.cli.importing import imports_that_stay
from converters.cli.options import LAYOUTS, given
from converters.outputs.base import OutputRequest, WriteOptions
from converters.outputs.table import find_format

HELP = f"""Merge trained adapters (PEANuT, LoRA, other methods of PEFT) into their base model: W = W0 + f(W0; θ).

Writes a checkpoint that transformers and vLLM load like any other model. Everything that can be refused is
refused before anything is written, and the output appears complete or not at all.

Examples:

  peanut-merge --base llama2-7b --adapter ./gsm8k

  peanut-merge --base ./smollm2 --adapter ./json -o ./smollm2-json --dtype bf16

  peanut-merge --base llama2-7b --adapter ./gsm8k --adapter ./style=0.5

  peanut-merge --base llama2-7b --adapter ./gsm8k --adapter ./code -o ./variants --each --share

  peanut-merge --base llama2-7b --adapter ./gsm8k --push-to-hub me/llama2-gsm8k --private

  peanut-merge --base llama2-7b --adapter ./gsm8k --format lora -o ./gsm8k-lora

  peanut-merge --base llama2-7b --adapter ./dora --format lora --rank 64 --max-error 0.02 --for vllm -o ./dora-lora

  peanut-merge --base vit-base --adapter ./pets --format onnx --quantize int8 --eval-data ./pets-test

  peanut-merge --base vit-base --adapter ./pets --adapter ./cars --format onnx --each --swappable -o ./tasks-onnx

  peanut-merge --base roberta-base --adapter ./mrpc/pytorch_model.bin --scaling 0.1 --labels labels.json

{LAYOUTS}
"""


def run_command(
    base: options.Base,
    adapter: options.Adapters,
    output: options.Output = None,
    output_format: options.FormatName = "merged",
    layout: options.Layout = None,
    scaling: options.Scaling = None,
    revision: options.Revision = None,
    adapter_revision: options.AdapterRevision = None,
    token: options.Token = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    max_shard_size: options.MaxShardSize = "5GB",
    labels: options.Labels = None,
    overwrite: options.Overwrite = False,
    force_base: options.ForceBase = False,
    verify: options.Verify = True,
    dry_run: options.DryRun = False,
    each: options.Each = False,
    share: options.Share = False,
    resume: options.Resume = False,
    stream: options.Stream = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    push_revision: options.PushRevision = None,
    rank: options.Rank = None,
    max_error: options.MaxError = None,
    runtime: options.Runtime = None,
    opset: options.Opset = None,
    quantize: options.Quantize = None,
    eval_data: options.EvalData = None,
    interpolate_pos_encoding: options.InterpolatePosEncoding = False,
    transformersjs: options.TransformersJs = False,
    swappable: options.Swappable = False,
    self_merging: options.SelfMerging = False,
    as_json: options.Json = False,
    version: options.Version = False,
) -> None:
    """Merge or convert; see `HELP`."""
    row = find_format(output_format)
    own = given(
        rank=rank,
        max_error=max_error,
        runtime=runtime,
        opset=opset,
        quantize=quantize,
        eval_data=eval_data,
        interpolate_pos_encoding=interpolate_pos_encoding,
        transformersjs=transformersjs,
        swappable=swappable,
        self_merging=self_merging,
    )
    row.check_options({**given(each=each, share=share, resume=resume, stream=stream), **own})
    with imports_that_stay():
        from converters.cli.merging import merge
        from converters.models.labels import read_labels
        from converters.outputs.upload import Push

    merge(
        row,
        Sources(base, adapter, revision, adapter_revision, token, layout, scaling, stream, names_have_weights=True),
        MergeOptions(row.dtype(dtype), max_shard_size, read_labels(labels) if labels else None, force_base),
        OutputRequest(output, each, WriteOptions(device, overwrite, verify, share, resume), own),
        Push(push_to_hub, private, push_revision, token),
        dry_run=dry_run,
        as_json=as_json,
    )
