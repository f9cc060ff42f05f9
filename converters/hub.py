"""Where a base and an adapter come from: a local path, a Hub id, or the short name of a model of the paper."""

from dataclasses import dataclass
from pathlib import Path

from converters.adapter_source import CONFIG_NAME, PEFT_WEIGHTS, AdapterSource
from converters.checkpoint import INDEX_FILE, MANIFEST_NAME, SINGLE_FILE, read_weight_map
from converters.companions import COMPANION_PATTERNS
from converters.errors import CheckpointError, LayoutError, OptionError
from converters.hub_errors import hub_errors
from converters.hub_names import SHORT_NAMES, is_hub_id
from converters.hub_stream import ShardStream

# what an adapter's repository may hold of use; weights of other layouts are looked at only if these have none
_ADAPTER_WEIGHTS = (*PEFT_WEIGHTS, "peanut_theta.safetensors")
_ADAPTER_FILES = (CONFIG_NAME, "peanut_config.json", "peanut_base.json", "config.json", "labels.json")
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class BaseSource:
    """A base that now lies in `folder`, its weights perhaps in `stream`.

    `note` says what was taken where that was a choice.
    """

    folder: Path
    repo_id: str | None = None
    revision: str | None = None
    note: str | None = None
    stream: ShardStream | None = None


def find_base(base: str, revision: str | None = None, token: str | None = None, stream: bool = False) -> BaseSource:
    """Resolve `--base`: a folder of that name wins, then the short names, then the Hub.

    Args:
        base: folder, short name (`llama2-7b`, ...) or Hub id (`user/model`).
        revision: branch, tag or commit on the Hub.
        token: Hub token; by default the one huggingface-hub finds (HF_TOKEN, `hf auth login`).
        stream: leave the weights on the Hub for now.

    Raises:
        CheckpointError: no such folder, and the name cannot be a Hub id.
        OptionError: `revision` or `stream` for a local folder.
        HubError: the download failed.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise OptionError(f"--revision {revision} has no meaning for the local folder {base}")
        if stream:
            raise OptionError(f"--stream has no meaning for the local folder {base}; wanted a Hub id")
        shadows = base in SHORT_NAMES
        note = f"base: the local folder {base} (not {SHORT_NAMES[base]} on the Hub)" if shadows else None
        return BaseSource(folder, note=note)
    if folder.is_file():
        raise CheckpointError(f"{base} is a file; wanted the folder that holds config.json and the weights")
    repo_id = SHORT_NAMES.get(base, base)
    if not is_hub_id(repo_id):
        raise CheckpointError(f"no folder {base}, and this is no Hub id; check the path")
    path = _download(repo_id, revision, token, weights=not stream)
    note = f"base: {base} is {repo_id} on the Hub, revision {path.name}" if repo_id != base else None
    shards = ShardStream(repo_id, path.name, token) if stream else None
    return BaseSource(path, repo_id, path.name, note, shards)


def find_adapter(adapter: str, revision: str | None = None, token: str | None = None) -> AdapterSource:
    """Resolve `--adapter`: a folder or file of that name wins, then the Hub.

    Args:
        adapter: folder, file of weights, or Hub id (`user/name`).
        revision: branch, tag or commit on the Hub.
        token: Hub token, as for `find_base`.

    Raises:
        LayoutError: nothing there, and the name cannot be a Hub id.
        OptionError: `revision` for a local path.
        HubError: the download failed.
    """
    path = Path(adapter).expanduser()
    if path.exists():
        if revision is not None:
            raise OptionError(f"--adapter-revision {revision} has no meaning for the local path {adapter}")
        return AdapterSource(path)
    if "/" not in adapter or not is_hub_id(adapter):
        raise LayoutError(f"{adapter} is not there; wanted the folder of a trained adapter, its weights, or a Hub id")
    with hub_errors(adapter, revision):
        from huggingface_hub import snapshot_download

        wanted = [*_ADAPTER_FILES, *_ADAPTER_WEIGHTS, *COMPANION_PATTERNS]
        folder = _snapshot(adapter, revision, token, wanted, CONFIG_NAME)
        if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
            snapshot_download(adapter, revision=folder.name, token=token, allow_patterns=list(_OTHER_WEIGHTS))
    return AdapterSource(folder, adapter, folder.name)


def _download(repo_id: str, revision: str | None, token: str | None, weights: bool) -> Path:
    """The cached snapshot with just what a merge reads: config, companions, safetensors, a mark of a merge."""
    small = ["config.json", INDEX_FILE, MANIFEST_NAME, *COMPANION_PATTERNS]
    if weights:
        small.append(SINGLE_FILE)
    with hub_errors(repo_id, revision):
        from huggingface_hub import snapshot_download

        folder = _snapshot(repo_id, revision, token, small, "config.json")
        index = folder / INDEX_FILE
        if weights and index.is_file() and not (folder / SINGLE_FILE).is_file():
            shards = sorted(set(read_weight_map(index).values()))
            if not all((folder / shard).is_file() for shard in shards):
                snapshot_download(repo_id, revision=folder.name, token=token, allow_patterns=shards)
    return folder


def _snapshot(repo_id: str, revision: str | None, token: str | None, patterns: list[str], main_file: str) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except IncompleteSnapshotError:
        # offline, with a cache that another program filled: it may lack files nobody needs
        found = try_to_load_from_cache(repo_id, main_file, revision=revision)
        if not isinstance(found, str):
            raise
        return Path(found).parent
