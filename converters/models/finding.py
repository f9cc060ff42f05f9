"""Finding a base model: a local folder, a Hub id, or the short name of a model of the paper."""

from dataclasses import dataclass
from pathlib import Path

from converters.errors import CheckpointError, OptionError
from converters.files.names import INDEX_FILE, MANIFEST_NAME, SINGLE_FILE
from converters.hub.download import fetch_snapshot
from converters.hub.errors import hub_errors
from converters.hub.names import SHORT_NAMES, is_hub_id
from converters.hub.stream import ShardStream
from converters.models.companions.names import COMPANION_PATTERNS
from converters.models.weight_files import read_weight_map, refuse_gguf


@dataclass(frozen=True)
class BaseSource:
    """A base that is available in `folder`, with its weights possibly in `stream`.

    `note` explains which source was chosen where the name is ambiguous or short.
    """

    folder: Path
    repo_id: str | None = None
    revision: str | None = None
    note: str | None = None
    stream: ShardStream | None = None


def base_folder(base: str) -> Path | None:
    """The folder of a base; None if its name stands for one on the Hub.

    Raises `CheckpointError` if it is a file, or neither a folder nor a valid Hub id.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        refuse_gguf(folder)
        raise CheckpointError(f"{base} is a file; expected the folder with config.json and the weights")
    if not is_hub_id(SHORT_NAMES.get(base, base)):
        raise CheckpointError(f"there is no folder {base}, and it is not a valid Hub id; check the path")
    return None


def find_base(base: str, revision: str | None = None, token: str | None = None, stream: bool = False) -> BaseSource:
    """Resolve the name of a base: a local folder first, then the short names, then the Hub.

    Args:
        base: folder, short name (`llama2-7b`, ...) or Hub id (`user/model`).
        revision: branch, tag or commit on the Hub.
        token: Hub token; defaults to the one that huggingface-hub finds (HF_TOKEN, `hf auth login`).
        stream: do not download the weights yet.

    Raises:
        CheckpointError: there is no such folder, and the name is not a valid Hub id.
        OptionError: `revision` or `stream` was given for a local folder.
        HubError: the download failed.
    """
    folder = base_folder(base)
    if folder is not None:
        if revision is not None:
            raise OptionError(f"revision={revision!r} has no meaning for the local folder {base}; leave it out")
        if stream:
            raise OptionError(f"stream=True has no meaning for the local folder {base}; expected a Hub id")
        shadows = base in SHORT_NAMES
        note = f"base: the local folder {base} (not {SHORT_NAMES[base]} on the Hub)" if shadows else None
        return BaseSource(folder, note=note)
    repo_id = SHORT_NAMES.get(base, base)
    path = _download(repo_id, revision, token, weights=not stream)
    note = f"base: {base} is {repo_id} on the Hub, revision {path.name}" if repo_id != base else None
    shards = ShardStream(repo_id, path.name, token) if stream else None
    return BaseSource(path, repo_id, path.name, note, shards)


def _download(repo_id: str, revision: str | None, token: str | None, weights: bool) -> Path:
    """Download only what a merge reads: config, companions, safetensors, and the manifest of a merged model."""
    small = ["config.json", INDEX_FILE, MANIFEST_NAME, *COMPANION_PATTERNS]
    if weights:
        small.append(SINGLE_FILE)
    with hub_errors(repo_id, revision):
        from huggingface_hub import snapshot_download

        folder = fetch_snapshot(repo_id, revision, token, small, "config.json")
        index = folder / INDEX_FILE
        if weights and index.is_file() and not (folder / SINGLE_FILE).is_file():
            shards = sorted(set(read_weight_map(index).values()))
            if not all((folder / shard).is_file() for shard in shards):
                snapshot_download(repo_id, revision=folder.name, token=token, allow_patterns=shards)
    return folder
