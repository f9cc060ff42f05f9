"""The command `peanut-serve size`: how much memory a server needs, before it is started."""

import json
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, NoReturn

import typer

from converters import Checkpoint, open_checkpoint
from converters.cli import console
from converters.cli.flags import in_flags
from converters.cli.numbers import COUNT, finite
from converters.cli.options import Json
from converters.errors import CheckpointError, OptionError, PeanutError
from converters.serving import SHORT_NAMES, base_folder, parse_size
from peanut_serve.cli.server_options import BaseCopy, Mode
from peanut_serve.variants.sizing import (
    BYTES,
    VariantSize,
    device_copy_bytes,
    engine_bytes,
    engine_dtype,
    key_value_size,
    sequences_that_fit,
    slot_bytes,
    text_config,
    variant_sizes,
)

HELP = """Show how much memory a server of a base and its adapters needs, from the headers of the files.

What vLLM needs besides, for activations and CUDA graphs, is measured when it starts: leave some GiB for it. In merged
mode, the GPU holds one variant at a time. Nothing is loaded, and no GPU is needed.

Examples:

  peanut-serve size --base ./smollm2 --adapters ./tasks

  peanut-serve size --base ./smollm2 --adapters ./tasks --mode merged --gpu-memory 80GB --max-model-len 8192
"""

_MAX_LORAS = 8  # slots that the launcher asks for at most


class _Dtype(str, Enum):
    AUTO, BFLOAT16, FLOAT16, FLOAT32 = "auto", "bfloat16", "float16", "float32"


class _CacheDtype(str, Enum):
    AUTO, FP8 = "auto", "fp8"


def _size(
    base: Annotated[str, typer.Option("--base", help="Folder of the base model.")],
    adapters: Annotated[
        list[str], typer.Option("--adapters", help="Folder of adapters, or a Hub id. Can be repeated.")
    ],
    mode: Annotated[Mode, typer.Option("--mode", help="How to serve variants.")] = Mode.LORA,
    dtype: Annotated[_Dtype, typer.Option("--dtype", help="As for vLLM.")] = _Dtype.AUTO,
    kv_cache_dtype: Annotated[_CacheDtype, typer.Option("--kv-cache-dtype", help="As for vLLM.")] = _CacheDtype.AUTO,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", min=1, max=10**9, help="As for vLLM (default: that of the config)."),
    ] = None,
    max_loras: Annotated[
        int | None,
        typer.Option("--max-loras", min=1, max=COUNT, help="As for vLLM (default: as peanut-serve chooses)."),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Memory of a GPU, like 80GB: shows what fits.")
    ] = None,
    utilization: Annotated[
        float,
        typer.Option("--gpu-memory-utilization", min=0.01, max=1.0, callback=finite, help="As for vLLM."),
    ] = 0.92,
    host_cache: Annotated[str, typer.Option("--host-cache", help="As for peanut-serve.")] = "8GiB",
    base_copy: Annotated[BaseCopy, typer.Option("--base-copy", help="As for peanut-serve.")] = BaseCopy.HOST,
    as_json: Json = False,
) -> None:
    checkpoint = _opened(base)
    cache_limit, gpu = _bytes("--host-cache", host_cache), _bytes("--gpu-memory", gpu_memory)
    name = engine_dtype(checkpoint, dtype.value)
    keeps_base = base_copy is BaseCopy.DEVICE
    variants, refused = variant_sizes(checkpoint, adapters, mode.value, name, keeps_base)
    copy = device_copy_bytes(checkpoint, variants) if keeps_base else 0
    lora = [variant for variant in variants if variant.rank is not None]
    rank, slot = slot_bytes(checkpoint, variants, name)
    slots = (max_loras or min(len(lora), _MAX_LORAS)) if lora else 0
    length = max_model_len or int(text_config(checkpoint.config).get("max_position_embeddings") or 0)
    cache = key_value_size(checkpoint.config, 1 if kv_cache_dtype is _CacheDtype.FP8 else BYTES[name])
    weights = engine_bytes(checkpoint, name)
    facts: dict[str, Any] = {
        "dtype": name, "checkpoint": sum(info.nbytes for info in checkpoint.tensors.values()), "engine": weights,
        "base_copy": copy,
        "lora_rank": rank, "lora_slots": slots, "lora_bytes": slots * slot,
        "variants": [_facts(variant) for variant in variants], "refused": refused,
        "host_cache": _host_cache(variants, cache_limit),
        "kv_token": cache.token if cache else None, "max_model_len": length or None,
        "kv_sequence": cache.sequence(length) if cache and length else None,
    }  # fmt: skip
    if gpu is not None:
        free = int(gpu * utilization) - weights - slots * slot
        fits = sequences_that_fit(free, cache, length) if cache and length else None
        facts["gpu"] = {"usable": int(gpu * utilization), "left": free, "sequences": fits}
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    if gpu is not None and facts["gpu"]["left"] <= 0:
        raise OptionError(
            f"--gpu-memory {gpu_memory} is too small: the weights alone leave nothing for the KV cache; "
            "use a larger GPU, several with --tensor-parallel-size, or a smaller base"
        )
    if gpu is not None and copy > gpu - facts["gpu"]["usable"]:
        size, left = console.size_text, gpu - facts["gpu"]["usable"]
        raise OptionError(
            f"--base-copy device takes up to {size(copy)} beside vLLM, but --gpu-memory-utilization {utilization:g} "
            f"leaves {size(left)} of {gpu_memory}; use {max(gpu - copy, 0) / gpu:.2f}, or --base-copy host"
        )


def _opened(base: str) -> Checkpoint:
    folder = base_folder(base)
    if folder is not None:
        return open_checkpoint(folder)
    repository = SHORT_NAMES.get(base, base)
    raise CheckpointError(f"there is no folder {base}; download the base first, with: hf download {repository}")


def _bytes(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (size := parse_size(text)):
        raise OptionError(f"{option} is {text}; expected a size like 80GB")
    return size


def _facts(variant: VariantSize) -> dict[str, Any]:
    return {
        "name": variant.name, "served": "lora" if variant.rank is not None else "merged",
        "rank": variant.rank, "factors": variant.factors, "merged": variant.merged,
    }  # fmt: skip


def _host_cache(variants: Sequence[VariantSize], limit: int | None) -> dict[str, Any]:
    """The host cache: its limit, what all variants take, and how many of the largest fit at once."""
    merged = sorted((variant.merged for variant in variants if variant.merged), reverse=True)
    fits, left = 0, limit or 0
    for size in merged:
        left -= size
        fits += left >= 0
    return {"limit": limit, "all": sum(merged), "largest": max(merged, default=0), "at_once": fits}


def _show(facts: Mapping[str, Any]) -> None:
    size = console.size_text

    def line(what: str, text: str) -> None:
        console.out.print(f"{what:34} {text}", markup=False)

    line("base on the disk", size(facts["checkpoint"]))
    line(f"base in the engine, {facts['dtype']}", size(facts["engine"]))
    if facts["base_copy"]:
        line("copy of the base on the device", f"at most {size(facts['base_copy'])}")
    for variant in facts["variants"]:
        is_lora = variant["served"] == "lora"
        text = f"LoRA of rank {variant['rank']}, {size(variant['factors'])}" if is_lora else "merged"
        line(variant["name"], text if is_lora else f"merged, {size(variant['merged'])} in the host cache")
    if facts["lora_slots"]:
        line(f"{facts['lora_slots']} LoRA slots of rank {facts['lora_rank']}", size(facts["lora_bytes"]))
    cache = facts["host_cache"]
    if cache["all"]:
        line("host cache", f"{size(cache['all'])} for all, {cache['at_once']} of them fit in {size(cache['limit'])}")
    if facts["kv_token"] is None:
        line("KV cache", "not known for the layers of this model; vLLM logs it at the start")
    else:
        line("KV cache of a token", f"{facts['kv_token']:,} bytes")
        if facts["kv_sequence"]:
            line(f"KV cache of {facts['max_model_len']} tokens", size(facts["kv_sequence"]))
    if gpu := facts.get("gpu"):
        line("usable on the GPU", size(gpu["usable"]))
        line("left for activations and KV cache", size(max(gpu["left"], 0)))
        if gpu["sequences"] is not None:
            line("sequences of full length", f"fewer than {gpu['sequences'] + 1}")
    for name, reason in facts["refused"].items():
        console.err.print(f"note: {name} will not be served: {in_flags(reason)}", markup=False)


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve size` with these arguments: an error is one line on stderr and exit code 1."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name="size", help=HELP)(_size)
    try:
        app(argv, prog_name="peanut-serve size")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve size: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
