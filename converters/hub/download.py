"""Snapshots of repositories on the Hub, through huggingface-hub's cache."""

from pathlib import Path


def fetch_snapshot(
    repo_id: str, revision: str | None, token: str | None, patterns: list[str], main_file: str
) -> Path:
    """The folder of a commit in the cache, with the files that match `patterns` fetched.

    Args:
        repo_id, revision, token: of the repository.
        patterns: which files.
        main_file: by which an offline cache that another program filled is found.

    Raises what huggingface_hub raises; see `converters.hub.errors.hub_errors`.
    """
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


def hide_progress_bars() -> None:
    """Show no progress bars of huggingface-hub: beside another bar they overwrite each other."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
