"""Files of programs that are not read: what they are, and what to do."""

from pathlib import Path

from converters.errors import LayoutError

_GIVE = "give the adapter in the form in which it was trained"

# ending of a file -> what it is, and what to do
_ENDINGS = {
    ".gguf": "GGUF, for llama.cpp, whose names and orders of rows are its own; llama-export-lora merges it, or "
    f"{_GIVE}",
    ".nemo": "an archive of NVIDIA's NeMo; merge it there, or export it from there to Hugging Face PEFT's form",
    ".npz": "NumPy's, as early examples of MLX saved adapters; train or save it with an mlx-lm that writes "
    "adapters.safetensors",
    ".h5": f"Keras', whose names are its own; {_GIVE}, or save the merged model with Keras",
    ".msgpack": f"Flax'; {_GIVE}, as safetensors",
}
# files in a folder -> the same
_FOLDERS = {
    "intkey_*.bin": "an intervention of pyreft (ReFT), which edits the hidden states of some tokens, so it cannot be "
    "merged; serve it with pyreft",
    "context/model.yaml": "a checkpoint of NVIDIA's NeMo; merge it there, or export it from there to Hugging Face "
    "PEFT's form",
    **dict.fromkeys(
        ("latest_checkpointed_iteration.txt", "mp_rank_*/model_*", "iter_*/run_config.yaml"),
        "a checkpoint of Megatron; merge it there, or export it from there to Hugging Face PEFT's form",
    ),
}


def refuse_foreign_file(file: Path) -> None:
    """Raise `LayoutError` for a file of weights in a form that is not read."""
    what = _ENDINGS.get(file.suffix.lower())
    if what is not None:
        raise LayoutError(f"{file} is {what}")


def refuse_foreign_folder(folder: Path) -> None:
    """Raise `LayoutError` for the checkpoint folder of a program that is not read."""
    for pattern, what in _FOLDERS.items():
        if (found := next(folder.glob(pattern), None)) is not None:
            raise LayoutError(f"{folder} is {what} (it has {found.relative_to(folder)})")
