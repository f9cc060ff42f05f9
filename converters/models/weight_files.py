"""Which files of a folder are the weights of its model, where several could be."""

import re
from collections.abc import Callable
from pathlib import Path

from converters.errors import CheckpointError
from converters.files.json_files import read_json
from converters.files.names import INDEX_FILE, SINGLE_FILE

_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_VARIANT = re.compile(r"model(\.safetensors\.index)?\.(?!safet)(?P<name>[\w-]+?)(-\d+-of-\d+)?\.(safetensors|json)")

# other forms of weights -> what they are, and what to do
_OTHER_FORMS = {
    "consolidated*": "in the form of its maker's own code",
    "*.bin": "as pickles",
    "*.pt": "as pickles",
    "*.pth": "as pickles",
    "*.h5": "for TensorFlow",
    "*.msgpack": "for Flax",
}
_CONVERT = (
    "expected safetensors; convert them once with transformers: "
    "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW), using the class of the model"
)


def find_weights(folder: Path, has: Callable[[str], bool]) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The files of the weights in order, and tensor -> file as the index says, if there is one.

    As in transformers, a single file takes precedence over an index. Files that only lack their index are taken.

    Args:
        folder: the folder.
        has: whether there is a file of a name in it.

    Raises `CheckpointError` if there are none, if some are missing, or if it is not clear which to take.
    """
    index = folder / INDEX_FILE
    if has(SINGLE_FILE):
        return (SINGLE_FILE,), None
    if index.is_file():
        weight_map = read_weight_map(index)
        names = tuple(sorted(set(weight_map.values())))
        if missing := [name for name in names if not has(name)]:
            raise CheckpointError(_missing(folder, missing, f"{INDEX_FILE} names it"))
        return names, weight_map
    if found := _without_index(folder):
        return found, None
    raise CheckpointError(_nothing(folder))


def read_weight_map(index: Path) -> dict[str, str]:
    """Read tensor name -> shard from an index. Raises `CheckpointError` for shards outside its folder."""
    weight_map = read_json(index, "shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; fetch the model again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: '{name}' is not a file name in the same folder")
    return weight_map


def refuse_partial(folder: Path, names: set[str]) -> None:
    """Raise `CheckpointError` if a single file with the tensors `names` lacks some that an index beside it names.

    Then the folder mixes two models, or two ways to save one.
    """
    index = folder / INDEX_FILE
    lacking = sorted(set(read_weight_map(index)) - names) if index.is_file() else []
    if lacking:
        raise CheckpointError(
            f"{folder} holds two sets of weights: {SINGLE_FILE}, which comes first, lacks {len(lacking)} tensors "
            f"that {INDEX_FILE} names, for example {lacking[0]}; remove the one that does not belong to the model"
        )


def refuse_gguf(path: Path) -> None:
    """Raise `CheckpointError` if a file, or a file in a folder, is a model for llama.cpp."""
    for file in [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")):
        raise CheckpointError(
            f"{file} is a GGUF for llama.cpp, often with quantised weights; expected the safetensors checkpoint that "
            "it was made from: merge into that, then convert the result with llama.cpp's convert_hf_to_gguf.py"
        )


def _without_index(folder: Path) -> tuple[str, ...]:
    """Shards that are all there by their own count. Raises `CheckpointError` if some are missing."""
    found = {path.name: match for path in folder.glob("*.safetensors") if (match := _SHARD.fullmatch(path.name))}
    totals = {int(match[2]) for match in found.values()}
    if not totals:
        return ()
    if len(totals) > 1:
        first, second = sorted(totals)[:2]
        raise CheckpointError(
            f"{folder} holds shards of two models, of {first} and of {second} files, and no {INDEX_FILE}; fetch the "
            "model again into an empty folder"
        )
    (total,) = totals
    numbers = {int(match[1]) for match in found.values()}
    if missing := [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1) if i not in numbers]:
        raise CheckpointError(_missing(folder, missing, f"others of the {total} are there"))
    return tuple(sorted(found))


def _missing(folder: Path, missing: list[str], why: str) -> str:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{folder}: the shard {missing[0]} is missing{more} ({why}); fetch the model again"


def _nothing(folder: Path) -> str:
    """The message for a folder without weights that are read, with what is there instead."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in names:
        if found := _VARIANT.fullmatch(name):
            variant = found["name"]
            return (
                f"{folder} has its weights only as the variant {variant!r} ({name}), expected {SINGLE_FILE} or "
                f"{INDEX_FILE}; if the adapter was trained on these, rename the files, without '.{variant}', or load "
                f"them with variant={variant!r} in transformers and save them with save_pretrained"
            )
    for pattern, form in _OTHER_FORMS.items():
        for path in sorted(folder.glob(pattern)):
            return f"{folder} stores its weights {form} ({path.name}), {_CONVERT}"
    refuse_gguf(folder)
    return (
        f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; expected safetensors weights (a model that is "
        "only available as pickles must be saved once with transformers' save_pretrained)"
    )
