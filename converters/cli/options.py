"""The options of `peanut-merge` and `peanut-inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from converters._version import __version__
from converters.adapters.layouts.names import LAYOUT_SUMMARIES
from converters.outputs.table import format_summaries

# click keeps the line breaks of a paragraph that begins with \b
LAYOUTS = "Layouts, detected where possible (otherwise give --layout):\n\n\b\n" + "\n".join(
    f"  {name:20} {summary}" for name, summary in LAYOUT_SUMMARIES.items()
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peanut-serve {__version__}")
        raise typer.Exit


# both commands
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the base on the Hub.")]
AdapterRevision = Annotated[
    str | None, typer.Option("--adapter-revision", help="Branch, tag or commit of an adapter on the Hub.")
]
Layout = Annotated[
    str | None, typer.Option("--layout", help="Layout of the adapter, if it cannot be detected: see below.")
]
Scaling = Annotated[float | None, typer.Option("--scaling", help="Scale s of f, if the adapter does not store it.")]
Token = Annotated[str | None, typer.Option("--token", help="Hub token; HF_TOKEN works as well.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]

# peanut-merge: inputs
Base = Annotated[
    str,
    typer.Option(
        "--base", help="Folder, Hub id, llama2-7b, llama3-8b, qwen3-8b, ..., or 'self': see converters/README.md."
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option("--adapter", help="Folder, weights or Hub id. Repeat it to sum several; PATH=0.5 sets a weight."),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="JSON list of class labels, for a head that comes with the adapter."),
]
ForceBase = Annotated[
    bool, typer.Option("--force-base", help="Merge even if the adapter was trained on another base.")
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Fetch a base on the Hub shard by shard; at most two are on the disk.")
]

# peanut-merge: outputs
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Default: ./<base>-<adapter>")]
FormatName = Annotated[str, typer.Option("--format", help=f"{format_summaries()}.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as the base), bf16, fp16 or fp32.")]
Device = Annotated[str, typer.Option("--device", help="Where f is evaluated: auto, cpu, cuda, cuda:N.")]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Like 5GB; 'base' keeps the base's sharding.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output, in one step at the end.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check the written files before they are published.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and the sizes; write nothing.")]
Each = Annotated[
    bool, typer.Option("--each", help="Write one output per adapter, -o/<adapter>; the base is read once.")
]
Share = Annotated[
    bool,
    typer.Option(
        "--share", help="Link to files that no adapter changes instead of copying them; ONNX: keep them in one file."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run; keep what is done if this one fails.")
]
PushToHub = Annotated[
    str | None, typer.Option("--push-to-hub", help="Upload the finished folder to this Hub repository.")
]
Private = Annotated[bool, typer.Option("--private", help="Create that repository as a private one.")]
PushRevision = Annotated[str | None, typer.Option("--push-revision", help="Branch of that repository to upload to.")]

# peanut-merge: LoRA
Rank = Annotated[
    int | None,
    typer.Option("--rank", help="LoRA: approximate what has no exact factors, or larger ones, at this rank."),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error", help="LoRA: what --rank may lose of each module's delta; default 0.01, which is 1 %."
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option("--for", help="LoRA: vllm writes experts as vLLM loads them, and refuses what it would not load."),
]

# peanut-merge: ONNX
Opset = Annotated[int | None, typer.Option("--opset", help="ONNX: by default 18, which runs nearly everywhere.")]
Quantize = Annotated[
    list[str] | None,
    typer.Option("--quantize", help="ONNX: also write int8 (dynamic) or fp16; repeat it for both."),
]
EvalData = Annotated[
    Path | None,
    typer.Option("--eval-data", help="ONNX: measure the graphs on DIR/<label>/image.png, or sound.wav, or a CSV."),
]
InterpolatePosEncoding = Annotated[
    bool,
    typer.Option(
        "--interpolate-pos-encoding", help="ONNX: images of another size than the config's, as in transformers."
    ),
]
TransformersJs = Annotated[
    bool, typer.Option("--transformersjs", help="ONNX: put the files where transformers.js looks for them.")
]
Swappable = Annotated[
    bool, typer.Option("--swappable", help="ONNX: one graph, and a small .onnx_adapter for each task.")
]
SelfMerging = Annotated[
    bool, typer.Option("--self-merging", help="ONNX: keep θ and f in the graph, which merges itself when loaded.")
]


def given(**options: Any) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: value for name, value in options.items() if not (value is None or value is False or value == [])}
