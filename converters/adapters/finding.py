"""Where an adapter comes from: a local folder or file, or a Hub id."""

from pathlib import Path

from converters.adapters.shards import INDEX_NAMES
from converters.adapters.source import AdapterSource
from converters.errors import LayoutError, OptionError
from converters.files.names import ADAPTER_CONFIG, MLX_WEIGHTS, NATIVE_WEIGHTS, PEFT_WEIGHTS
from converters.hub.download import fetch_snapshot
from converters.hub.errors import hub_errors
from converters.hub.names import is_hub_id
from converters.models.companions.names import COMPANION_PATTERNS

# files of an adapter's repository that can be used; weights of other layouts are tried only if none of these exist
_ADAPTER_WEIGHTS = (*PEFT_WEIGHTS, NATIVE_WEIGHTS, MLX_WEIGHTS)
_ADAPTER_FILES = (ADAPTER_CONFIG, "peanut_config.json", "peanut_base.json", "config.json", "labels.json")
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


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
            raise OptionError(
                f"adapter_revision={revision!r} has no meaning for the local path {adapter}; leave it out"
            )
        return AdapterSource(path)
    if "/" not in adapter or not is_hub_id(adapter):
        raise LayoutError(
            f"{adapter} does not exist; expected the folder of a trained adapter, its weights, or a Hub id"
        )
    with hub_errors(adapter, revision):
        from huggingface_hub import snapshot_download

        wanted = [*_ADAPTER_FILES, *_ADAPTER_WEIGHTS, *INDEX_NAMES, *COMPANION_PATTERNS]
        folder = fetch_snapshot(adapter, revision, token, wanted, ADAPTER_CONFIG)
        if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
            snapshot_download(adapter, revision=folder.name, token=token, allow_patterns=list(_OTHER_WEIGHTS))
    return AdapterSource(folder, adapter, folder.name)
